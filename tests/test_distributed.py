"""Several processes (gloo) against one with the whole batch: DistributedDataParallel and FSDP2."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

SCRIPT = Path(__file__).parent / "distributed_run.py"
# v of the whole batch, for a part is other examples on several processes than on one; nothing stays of v's start.
EIGEN = {"eigen_interval": 2, "eigen_warmup_steps": 0, "eigen_batch_fraction": 1.0, "eigen_momentum": 0.0}
XSAM = {"rho": 0.1, "alpha": 0.5, "normalize_gradient": False, **EIGEN}
SAM = {"rho": 0.1, "alpha": 0.0}
ONE_PASS = {**XSAM, "rho": 0.2, "perturbation": "eigenvector"}
RANDOM = {"rho": 0.2, "alpha": 0.0, "perturbation": "random"}


def command(processes, cases, folder):
    """Return the command that runs the cases one after the other under torchrun, and the file of what each gives."""
    specification, output = folder / "cases.json", folder / "results.pt"
    specification.write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(SCRIPT), str(specification), str(output)], output


def launch(processes, cases, folder):
    """Run the cases, and return what each gave and what the processes said."""
    arguments, output = command(processes, cases, folder)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-5000:]
    return torch.load(output), result.stderr


def case(config, world, examples=32, global_batch=8, accumulation=2, **settings):
    arguments = {
        "per_device_train_batch_size": global_batch // world,
        "gradient_accumulation_steps": accumulation,
        "average_tokens_across_devices": False,
        "optim": "sgd",
        **settings.pop("arguments", {}),
    }
    return {"config": config, "examples": examples, "arguments": arguments, **settings}


def ddp_cases(world):
    return {
        "exact": case({**XSAM, "hvp": "exact"}, world),
        "buckets": case({**XSAM, "hvp": "exact"}, world, bucket_bytes=5000),
        "finite_difference": case({**XSAM, "hvp": "finite_difference"}, world),
        "one pass": case({**ONE_PASS, "hvp": "exact"}, world),
        "random direction": case(RANDOM, world),
        "one pass, both sides": case({**ONE_PASS, "hvp": "finite_difference"}, world),
        "measured": case({**XSAM, "hvp": "exact"}, world, measure_every=2),
        "scopes": case({**XSAM, "hvp": "exact", "perturb_scope": "norm", "eigen_scope": r"layer\.1\."}, world),
        "unused": case(
            {**XSAM, "hvp": "exact"}, world, model="branches", arguments={"ddp_find_unused_parameters": True}
        ),
        # One example a process, which calls one of the heads.
        "branches, local": case(
            {**XSAM, "ascent": "local"},
            world,
            examples=16,
            global_batch=world,
            accumulation=1,
            model="branches",
            arguments={"ddp_find_unused_parameters": True},
        ),
        "uneven": case({**XSAM, "hvp": "exact"}, world, examples=24 + 4, accumulation=1),
        "short window": case({**XSAM, "hvp": "exact"}, world, examples=24),
        "local": case({**XSAM, "ascent": "local"}, world),
        "local, finite difference": case({**XSAM, "ascent": "local", "hvp": "finite_difference"}, world),
        "one fused": case(XSAM, world, model="fused", arguments={"ddp_find_unused_parameters": True}),
        "global SAM": case(SAM, world, accumulation=1),
        "local SAM": case({**SAM, "ascent": "local"}, world, accumulation=1),
        "accumulated SAM": case(SAM, world),
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(1, ddp_cases(1), tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    world, cases = request.param, ddp_cases(request.param)
    if world == 4:
        mesh = {"dp_replicate_size": 2, "dp_shard_size": 2}
        cases["hybrid"] = {**cases["finite_difference"], "strategy": "fsdp2", "mesh": mesh}
    return launch(world, cases, tmp_path_factory.mktemp("several"))[0]


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance)


class TestDistributedDataParallel:
    @pytest.mark.parametrize(
        "name",
        ["exact", "finite_difference", "scopes", "unused", "short window", "one pass", "one pass, both sides"],
    )
    def test_global_ascent_equals_one_process(self, one, several, name):
        tolerance = 1e-6 if name in ("finite_difference", "one pass, both sides") else 1e-9
        assert_close(several[name]["weights"], one[name]["weights"], tolerance)
        assert_close(several[name]["eigenvector"], one[name]["eigenvector"], tolerance * 1e3)
        assert several[name]["ranks_agree"]
        assert several[name]["top_eigenvalue"] == pytest.approx(one[name]["top_eigenvalue"], rel=1e-3)
        logged = {metric: value for metric, value in one[name]["logs"][-1].items() if metric.startswith("xsam/")}
        assert "xsam/rayleigh_quotient" in logged
        for metric, value in logged.items():
            assert several[name]["logs"][-1][metric] == pytest.approx(value, rel=1e-5, abs=1e-6)

    def test_a_random_direction_is_the_same_on_every_process(self, one, several):
        assert_close(several["random direction"]["weights"], one["random direction"]["weights"], 1e-9)
        assert several["random direction"]["ranks_agree"]

    def test_a_head_that_only_some_processes_use(self, one):
        unused = one["unused"]["eigenvector"]
        assert unused["heads.2.weight"].norm() == 0
        assert unused["heads.0.weight"].norm() > 0
        assert unused["heads.1.weight"].norm() > 0

    @pytest.mark.parametrize("name", ["uneven", "local", "local, finite difference", "branches, local"])
    def test_ranks_stay_together(self, one, several, name):
        assert several[name]["ranks_agree"]
        assert several[name]["weights"].keys() == one[name]["weights"].keys()

    def test_the_callback_measures_the_same_and_changes_nothing(self, one, several):
        def measured(result, name):
            return [log[f"sharpness/{name}"] for log in result["measured"]["history"] if f"sharpness/{name}" in log]

        assert_close(several["measured"]["weights"], several["exact"]["weights"], 0)
        assert several["measured"]["ranks_agree"]
        for name in ("loss", "top_eigenvalue", "sam_sharpness"):
            assert len(measured(one, name)) == 2
            assert measured(several, name) == pytest.approx(measured(one, name), rel=1e-5)

    def test_all_take_the_product_that_each_can(self, one, several):
        assert one["one fused"]["method"] == one["exact"]["method"] == several["exact"]["method"] == "exact"
        assert several["one fused"]["method"] == "finite_difference"
        assert several["one fused"]["ranks_agree"]
        assert_close(several["one fused"]["weights"], one["one fused"]["weights"], 1e-6)

    def test_local_ascent_is_another_direction(self, one, several):
        ours, whole = several["local"]["weights"], one["local"]["weights"]
        assert any(not torch.equal(ours[name], whole[name]) for name in whole)

    def test_local_ascent_saves_an_all_reduce(self, several):
        steps = len(several["global SAM"]["logs"])
        assert steps == 8
        assert several["global SAM"]["gradient_all_reduces"] % (2 * steps) == 0
        assert several["local SAM"]["gradient_all_reduces"] * 2 == several["global SAM"]["gradient_all_reduces"]

    def test_an_exact_product_costs_one_all_reduce(self, several):
        # 2 refreshes of an iteration, and a vector of less than a bucket.
        assert several["exact"]["all_reduces"] - several["accumulated SAM"]["all_reduces"] == 2

    def test_a_vector_of_many_buckets_is_reduced_whole(self, several):
        assert several["buckets"]["ranks_agree"]
        assert several["buckets"]["all_reduces"] > several["exact"]["all_reduces"] + 10
        assert_close(several["buckets"]["weights"], several["exact"]["weights"], 1e-12)
        assert_close(several["buckets"]["eigenvector"], several["exact"]["eigenvector"], 1e-12)

    @pytest.mark.parametrize("several", [4], indirect=True)
    def test_two_replicas_of_two_shards_equal_four_of_the_whole(self, several):
        assert_close(several["hybrid"]["weights"], several["finite_difference"]["weights"], 1e-9)
        size = sum(part.numel() for part in several["hybrid"]["eigenvector"].values())
        assert several["hybrid"]["held"] == pytest.approx(size / 2, rel=0.05)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    cases = {}
    for dtype in ("float64", "float32"):
        for model in ("bert", "lora"):
            config = {**XSAM, "hvp": "finite_difference", "eigen_scope": "lora" if model == "lora" else "trainable"}
            for strategy in ("ddp", "fsdp2"):
                cases[f"{model} {dtype} {strategy}"] = case(config, 2, model=model, dtype=dtype, strategy=strategy)
    scopes = {**XSAM, "hvp": "finite_difference", "perturb_scope": "norm", "eigen_scope": r"layer\.1\."}
    for strategy in ("ddp", "fsdp2"):
        cases[f"scopes float64 {strategy}"] = case(scopes, 2, strategy=strategy)
        both_sides = {**ONE_PASS, "hvp": "auto" if strategy == "fsdp2" else "finite_difference"}
        both_sides["eigen_batch_fraction"] = 0.5  # which finite differences do without
        cases[f"one pass float64 {strategy}"] = case(both_sides, 2, strategy=strategy)
        cases[f"random direction float64 {strategy}"] = case(RANDOM, 2, strategy=strategy)
    cases["stock"] = case(None, 2, strategy="fsdp2")
    cases["SAM"] = case(SAM, 2, strategy="fsdp2")
    cases["auto"] = case(XSAM, 2, strategy="fsdp2")
    return launch(2, cases, tmp_path_factory.mktemp("sharded"))[0]


class TestFullyShardedDataParallel:
    @pytest.mark.parametrize("model", ["bert", "lora"])
    def test_equals_distributed_data_parallel(self, sharded, model):
        double, single = f"{model} float64 ", f"{model} float32 "
        assert_close(sharded[double + "fsdp2"]["weights"], sharded[double + "ddp"]["weights"], 1e-9)
        assert_close(sharded[single + "fsdp2"]["weights"], sharded[single + "ddp"]["weights"], 1e-5)
        top = sharded[double + "ddp"]["top_eigenvalue"]
        assert sharded[double + "fsdp2"]["top_eigenvalue"] == pytest.approx(top, rel=1e-6)

    def test_scopes(self, sharded):
        assert_close(sharded["scopes float64 fsdp2"]["weights"], sharded["scopes float64 ddp"]["weights"], 1e-9)
        assert all("layer.1." in name for name in sharded["scopes float64 fsdp2"]["eigenvector"])

    def test_one_pass(self, sharded):
        ours, expected = (sharded[f"one pass float64 {strategy}"] for strategy in ("fsdp2", "ddp"))
        assert_close(ours["weights"], expected["weights"], 1e-9)
        assert_close(ours["eigenvector"], expected["eigenvector"], 1e-8)
        assert ours["method"] == "finite_difference"
        # 4 steps of 2 micro-batches; 2 refreshes, of which the first, before a v is known, is by the two-pass way.
        each = (sharded["SAM"]["gathers"] - sharded["stock"]["gathers"]) / 8
        assert ours["gathers"] - sharded["stock"]["gathers"] == 4 * each

    def test_a_random_direction(self, sharded):
        ours, expected = (sharded[f"random direction float64 {strategy}"] for strategy in ("fsdp2", "ddp"))
        assert_close(ours["weights"], expected["weights"], 1e-9)

    def test_double_backward_is_not_tried(self, sharded):
        assert_close(sharded["auto"]["weights"], sharded["bert float64 fsdp2"]["weights"], 0)

    @pytest.mark.parametrize("model", ["bert", "lora"])
    def test_each_process_holds_its_part_of_the_eigenvector(self, sharded, model):
        result = sharded[f"{model} float64 fsdp2"]
        size = sum(part.numel() for part in result["eigenvector"].values())
        assert result["held"] == pytest.approx(size / 2, rel=0.05)

    def test_nothing_is_gathered_but_for_forward_and_backward_passes(self, sharded):
        # 4 steps of 2 micro-batches; 2 refreshes of an iteration.
        passes = {"stock": 8, "SAM": 16, "bert float64 fsdp2": 16 + 4}
        gathers = {name: sharded[name]["gathers"] for name in passes}
        each = (gathers["SAM"] - gathers["stock"]) / 8
        assert each > 0
        assert gathers["bert float64 fsdp2"] - gathers["SAM"] == 4 * each


# Not SGD without momentum: FSDP2's checkpoints of an optimizer without state cannot be read back (torch 2.13).
SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}


class TestResume:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return tmp_path_factory.mktemp("resume")

    @classmethod
    def resuming(cls, folder, world, strategy, resume=2, **settings):
        """A case that refreshes v at its first step alone; with `resume`, from the checkpoint of that step."""
        name = f"{strategy} checkpoints"
        return case(
            {**XSAM, "eigen_interval": 100},
            world,
            strategy=strategy,
            model="dropout",
            dtype="float32",
            folder=str(folder / name),
            resume=str(folder / name / f"checkpoint-{resume}") if resume else None,
            arguments={**SAVING, **settings},
        )

    @pytest.fixture(scope="class")
    @classmethod
    def uninterrupted(cls, folder):
        return launch(2, {s: cls.resuming(folder, 2, s, resume=None) for s in ("ddp", "fsdp2")}, folder)[0]

    def test_on_as_many_processes_it_equals_the_uninterrupted_run(self, folder, uninterrupted):
        cases = {s: self.resuming(folder, 2, s, save_strategy="no") for s in ("ddp", "fsdp2")}
        resumed, said = launch(2, cases, folder)
        for strategy, result in resumed.items():
            assert_close(result["weights"], uninterrupted[strategy]["weights"], 0)
            assert_close(result["eigenvector"], uninterrupted[strategy]["eigenvector"], 0)
        assert "bit for bit" not in said

    @pytest.mark.parametrize("processes", [1, 4])
    def test_on_another_number_it_goes_on_with_the_same_eigenvector(self, folder, uninterrupted, processes):
        strategies = ("ddp", "fsdp2") if processes > 1 else ("ddp",)
        cases = {s: self.resuming(folder, processes, s, save_strategy="no") for s in strategies}
        resumed, said = launch(processes, cases, folder)
        for strategy, result in resumed.items():
            assert result["step"] == 4
            assert_close(result["eigenvector"], uninterrupted[strategy]["eigenvector"], 0)
            assert_close(result["weights"], uninterrupted[strategy]["weights"], 0.05)
        assert f"written by 2 processes, and {processes} resume it" in said

    def test_each_process_wrote_its_part(self, folder, uninterrupted):
        sharded, whole = folder / "fsdp2 checkpoints" / "checkpoint-2", folder / "ddp checkpoints" / "checkpoint-2"
        sizes = [path.stat().st_size for path in sorted(sharded.glob("xsam_eigenvector-*-of-00002.safetensors"))]
        assert len(sizes) == 2
        (size,) = [path.stat().st_size for path in whole.glob("xsam_eigenvector*")]
        assert max(sizes) < 0.75 * size

    def test_a_lost_part_is_refused(self, folder, uninterrupted, tmp_path):
        shutil.copytree(folder / "fsdp2 checkpoints", tmp_path / "fsdp2 checkpoints")
        part = tmp_path / "fsdp2 checkpoints" / "checkpoint-2" / "xsam_eigenvector-00001-of-00002.safetensors"
        part.unlink()
        arguments, _ = command(2, {"fsdp2": self.resuming(tmp_path, 2, "fsdp2")}, tmp_path)
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
        assert result.returncode != 0
        assert f"{part} is missing or damaged" in result.stderr

    @classmethod
    def long(cls, folder):
        settings = case(
            {**XSAM, "eigen_interval": 2},
            2,
            model="dropout",
            dtype="float32",
            arguments={**SAVING, "num_train_epochs": 6},
        )
        return {"long": {**settings, "folder": str(folder), "resume": (folder / "checkpoint-2").exists() or None}}

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, folder):
        return launch(2, cls.long(folder / "whole"), folder)[0]["long"]

    @pytest.mark.parametrize("victims", ["all", "one"])
    def test_killed(self, expected, tmp_path, victims):
        arguments, output = command(2, self.long(tmp_path / "killed"), tmp_path)
        process = psutil.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "killed" / "checkpoint-2").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.Random(victims).uniform(0, 0.3))
        children = process.children()
        for victim in [process, *children] if victims == "all" else children[1:]:
            victim.kill()
        assert process.wait(120) != 0
        psutil.wait_procs(children)
        assert not output.exists()
        resumed = launch(2, self.long(tmp_path / "killed"), tmp_path)[0]["long"]
        assert_close(resumed["weights"], expected["weights"], 0)
        assert_close(resumed["eigenvector"], expected["eigenvector"], 0)
        assert resumed["ranks_agree"]

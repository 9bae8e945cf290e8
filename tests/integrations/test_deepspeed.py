"""DeepSpeed's ZeRO on the CPU (gloo) against DistributedDataParallel, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from hf_xsam import XSAMConfig
from hf_xsam.step.deepspeed_refusals import refuse_deepspeed

SCRIPT = Path(__file__).parent / "deepspeed_run.py"
STAGES = (1, 2, 3)
# v is of the whole batch, and by differences of gradients, as under ZeRO.
EIGEN = {"eigen_interval": 2, "eigen_warmup_steps": 0, "hvp": "finite_difference"}
MODES = {
    "stock": None,
    "SAM": {"rho": 0.1, "alpha": 0.0},
    "one pass": {"perturbation": "eigenvector", "alpha": 0.0, "rho": 0.3, **EIGEN},
    "random direction": {"perturbation": "random", "alpha": 0.0, "rho": 3.0},
    "X-SAM": {"rho": 0.1, "alpha": 0.5, "normalize_gradient": False, **EIGEN},
}
XSAM = MODES["X-SAM"]
# What decides on speed and memory alone, so small that a tiny model meets it.
BUCKETS = {"reduce_bucket_size": 300, "allgather_bucket_size": 300}
SETTINGS = {
    "overlapping": ((1, 2), {"overlap_comm": True}),
    "scattered gradients": (STAGES, {"contiguous_gradients": False}),
    "all-reduce": (STAGES, {"reduce_scatter": False}),
    "small buckets": (STAGES, BUCKETS),
    "many groups": ((3,), {"sub_group_size": 500, "stage3_param_persistence_threshold": 0}),
    "few at a time": (
        (3,),
        {
            "stage3_max_live_parameters": 300,
            "stage3_max_reuse_distance": 1,
            "stage3_prefetch_bucket_size": 10,
            "stage3_param_persistence_threshold": 20,
        },
    ),
}
OPTIMIZER = {"type": "AdamW", "params": {**dict.fromkeys(("lr", "eps", "weight_decay"), "auto"), "torch_adam": True}}
WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
SCHEDULER = {"type": "WarmupLR", "params": WARMUP}


def launch(processes, cases, folder):
    """Run the cases, and return what each gave and what the processes said."""
    specification, output = folder / "cases.json", folder / "results.pt"
    specification.write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [*launcher, str(SCRIPT), str(specification), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    return torch.load(output), result.stderr


def case(config, stage=0, **settings):
    """A case that accumulates two micro-batches, and clips."""
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "average_tokens_across_devices": False,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_grad_norm": 0.2,
        **settings.pop("arguments", {}),
    }
    return {"config": config, "stage": stage, "arguments": arguments, **settings}


def distance(one, other):
    """Return how far apart two runs' weights are, in the largest coordinate."""
    assert one["weights"].keys() == other["weights"].keys()
    return max((one["weights"][name] - other["weights"][name]).abs().max().item() for name in one["weights"])


def moved(result):
    """Return how the training has moved the weights."""
    return torch.cat([(result["weights"][name] - result["start"][name]).flatten() for name in result["weights"]])


def single_cases():
    cases = {f"{mode} {stage}": case(config, stage) for mode, config in MODES.items() for stage in (0, *STAGES)}
    for name, (stages, zero) in SETTINGS.items():
        cases |= {f"{name} {stage}": case(XSAM, stage, engine={"zero": zero}) for stage in stages}
    constant = {"lr_scheduler_type": "constant", "max_grad_norm": 0}
    adamw = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "optim_args": None}
    for stage in (0, *STAGES):
        every = {**XSAM, "replay_check": "every"}
        cases[f"LoRA {stage}"] = case({**XSAM, "eigen_scope": "lora"}, stage, model="lora")
        cases[f"dropout {stage}"] = case(every, stage, model="dropout", arguments={"gradient_accumulation_steps": 1})
        cases[f"adaptive {stage}"] = case({"rho": 1.0, "alpha": 0.0, "adaptive": True}, stage)
        scopes = {"perturb_scope": "norm", "eigen_scope": r"layer\.1\."}
        cases[f"scopes {stage}"] = case({**XSAM, **scopes}, stage)
        cases[f"short window {stage}"] = case(XSAM, stage, examples=24)
        cases[f"late {stage}"] = case({**XSAM, "start_step": 2}, stage)
        cases[f"AdamW {stage}"] = case(XSAM, stage, arguments=adamw)
        for mode in ("SAM", "one pass"):
            cases[f"spoilt {mode} {stage}"] = case(MODES[mode], stage, model="spoilt", arguments=constant)
        own = {"engine": {"optimizer": OPTIMIZER}} if stage else {}
        cases[f"DeepSpeed's optimizer {stage}"] = case(XSAM, stage, arguments=adamw, **own)
    for stage in STAGES:
        schedule = {"engine": {"optimizer": OPTIMIZER, "scheduler": SCHEDULER}, "arguments": {"warmup_steps": 4}}
        cases[f"scheduled plain {stage}"] = case({"rho": 0.0, "alpha": 0.0}, stage, **schedule)
        cases[f"scheduled stock {stage}"] = case(None, stage, **schedule)
        # 4 passes of the first step, none of which is for the check of replays.
        cases[f"interrupted SAM {stage}"] = case(
            {**MODES["SAM"], "replay_check": "never"}, stage, sabotage={"interrupt": 3}
        )
        cases[f"interrupted one pass {stage}"] = case(
            {**MODES["one pass"], "replay_check": "never"},
            stage,
            sabotage={"interrupt": 6},
            arguments={"learning_rate": 0.0},
        )
        cases[f"disturbed {stage}"] = case(MODES["SAM"], stage, sabotage={"noise": 0.1})
    return cases


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch(2, single_cases(), tmp_path_factory.mktemp("single"))


def names(*excluded):
    """Return the names of cases that are to equal DistributedDataParallel's, and of the stage that each has."""
    found = [name.rpartition(" ")[::2] for name in single_cases()]
    return [(name, stage) for name, stage in found if stage != "0" and not name.startswith(excluded)]


class TestFloat32:
    @pytest.mark.parametrize(("name", "stage"), names("interrupted", "disturbed", "scheduled"))
    def test_equals_distributed_data_parallel(self, single, name, stage):
        reference = single[0].get(f"{name} 0", single[0]["X-SAM 0"])  # where only ZeRO has the setting
        result = single[0][f"{name} {stage}"]
        assert distance(result, reference) <= 1e-5
        assert moved(reference).abs().max() > 1e-3

    @pytest.mark.parametrize("stage", STAGES)
    def test_deepspeeds_own_schedule(self, single, stage):
        assert distance(single[0][f"scheduled plain {stage}"], single[0][f"scheduled stock {stage}"]) == 0

    @pytest.mark.parametrize("mode", ["SAM", "one pass", "random direction", "X-SAM"])
    def test_is_not_the_stock_trainers_step(self, single, mode):
        assert distance(single[0][f"{mode} 0"], single[0]["stock 0"]) > 1e-4

    @pytest.mark.parametrize("stage", STAGES)
    def test_each_process_holds_its_part_of_the_eigenvector(self, single, stage):
        whole = single[0]["X-SAM 0"]["held"]
        assert single[0][f"X-SAM {stage}"]["held"] == pytest.approx(whole / 2, rel=0.05)

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("mode", ["SAM", "one pass"])
    def test_a_step_without_a_finite_gradient_is_skipped(self, single, mode, stage):
        assert single[0][f"spoilt {mode} {stage}"]["skipped"] == single[0][f"spoilt {mode} 0"]["skipped"] == 2

    @pytest.mark.parametrize("stage", STAGES)
    def test_sharpness_is_not_measured(self, single, stage):
        assert all("Measure the saved model" in said for said in single[0][f"X-SAM {stage}"]["refused"])

    def test_passes_run_again_are_the_same(self, single):
        assert "run again at the same weights gives another" not in single[1]

    @pytest.mark.parametrize("stage", STAGES)
    def test_one_pass(self, single, stage):
        # 4 steps of 2 micro-batches, the first one's check, a difference at w, and another pass at w - eps.
        assert single[0][f"one pass {stage}"]["passes"] == 8 + 3 * 2

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("mode", ["SAM", "one pass"])
    def test_an_exception_leaves_the_weights_as_they_were(self, single, mode, stage):
        result = single[0][f"interrupted {mode} {stage}"]
        assert "error" in result
        for name, weights in result["after"].items():
            assert torch.equal(weights, result["start"][name])

    @pytest.mark.parametrize("stage", STAGES)
    def test_an_engine_that_steps_with_another_gradient_is_stopped(self, single, stage):
        error = single[0][f"disturbed {stage}"]["error"]
        assert f"another gradient than the one that X-SAM left (ZeRO-{stage}, float32" in error


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    def of(mode, stage, **settings):
        return case(MODES[mode], stage, bf16=True, **settings)

    cases = {f"{mode} {stage}": of(mode, stage) for mode in MODES for stage in (0, *STAGES)}
    wide = {"data_types": {"grad_accum_dtype": "fp32"}}
    cases |= {f"wide {mode} {stage}": of(mode, stage, engine=wide) for mode in MODES for stage in (2, 3)}
    cases |= {
        f"LoRA {stage}": case({**XSAM, "eigen_scope": "lora"}, stage, bf16=True, model="lora") for stage in (0, *STAGES)
    }
    for stage in STAGES:
        cases[f"interrupted {stage}"] = of("SAM", stage, sabotage={"interrupt": 5})
    return launch(2, cases, tmp_path_factory.mktemp("half"))[0]


class TestBfloat16:
    # DistributedDataParallel computes under autocast, with float32 weights; DeepSpeed in bfloat16 throughout.
    @pytest.mark.parametrize(("stage", "accumulation"), [(1, ""), (2, ""), (3, ""), (2, "wide "), (3, "wide ")])
    @pytest.mark.parametrize("mode", MODES)
    def test_equals_distributed_data_parallel_within_rounding(self, half, mode, stage, accumulation):
        expected = moved(half[f"{mode} 0"])
        error = (moved(half[f"{accumulation}{mode} {stage}"]) - expected).norm() / expected.norm()
        assert error < 0.02
        if mode != "stock":
            assert error < 0.1 * (moved(half["stock 0"]) - expected).norm() / expected.norm()

    @pytest.mark.parametrize("stage", STAGES)
    def test_adapters(self, half, stage):
        expected = moved(half["LoRA 0"])
        assert (moved(half[f"LoRA {stage}"]) - expected).norm() / expected.norm() < 0.02

    @pytest.mark.parametrize("stage", STAGES)
    def test_an_exception_leaves_the_weights_as_they_were(self, half, stage):
        result = half[f"interrupted {stage}"]
        assert "error" in result
        for name, weights in result["after"].items():
            assert weights.dtype == torch.bfloat16
            assert torch.equal(weights.float(), result["start"][name])


def test_three_processes(tmp_path):
    cases = {f"{mode} {stage}": case(MODES[mode], stage) for mode in ("one pass", "X-SAM") for stage in (0, *STAGES)}
    results, _ = launch(3, cases, tmp_path)
    for mode in ("one pass", "X-SAM"):
        for stage in STAGES:
            assert distance(results[f"{mode} {stage}"], results[f"{mode} 0"]) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_equals_the_uninterrupted_run(tmp_path, dtype):
    saving = {"save_strategy": "steps", "save_steps": 1}

    def of(stage, resume):
        folder = tmp_path / str(stage)
        checkpoint = str(folder / "checkpoint-2") if resume else None
        arguments = {"save_strategy": "no"} if resume else saving
        settings = {"folder": str(folder), "resume": checkpoint, "arguments": arguments, "bf16": dtype == "bfloat16"}
        return case({**XSAM, "eigen_interval": 3}, stage, model="dropout", **settings)

    whole, _ = launch(2, {str(stage): of(stage, False) for stage in STAGES}, tmp_path)
    resumed, said = launch(2, {str(stage): of(stage, True) for stage in STAGES}, tmp_path)
    for stage in map(str, STAGES):
        assert distance(resumed[stage], whole[stage]) == 0
        assert resumed[stage]["eigenvalue"] == whole[stage]["eigenvalue"]
        assert len(list((tmp_path / stage / "checkpoint-2").glob("xsam_eigenvector-*-of-00002.safetensors"))) == 2
    assert "the run will not equal" not in said


def configuration(**settings):
    return {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, **settings}


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0. Set it to 1, 2 or 3"),
            (
                {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
                "zero_optimization.offload_optimizer.device='cpu'.*use stage 3 on more GPUs",
            ),
            (
                {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
                "zero_optimization.offload_param.device='nvme'.*LoRA",
            ),
            (
                {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
                "zero_optimization.zero_quantized_weights=True.*FSDP2",
            ),
            (
                {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
                "data_types.grad_accum_dtype='fp32'.*use stage 2 or 3",
            ),
            ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16.enabled=True.*Use bf16"),
            ({"optimizer": {"type": "Muon"}}, "optimizer.type='Muon'.*Use 'AdamW'"),
            ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel=.*Leave it out"),
            (
                {"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}},
                "zero_optimization.load_from_fp32_weights=False.*Leave it out",
            ),
            ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow=False.*Leave it out"),
        ],
    )
    def test_settings_that_are_not_tested(self, settings, message):
        with pytest.raises(ValueError, match=f"does not support DeepSpeed with {message}"):
            refuse_deepspeed(configuration(**settings), XSAMConfig())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"hvp": "exact"}, "Use hvp='finite_difference'"), ({"ascent": "local"}, "Use ascent='global'")],
    )
    def test_settings_of_xsam(self, settings, message):
        with pytest.raises(ValueError, match=message):
            refuse_deepspeed(configuration(), XSAMConfig(**settings))

    def test_what_is_off_is_allowed(self):
        off = {"device": "none", "pin_memory": True}
        zero = {"stage": 3, "offload_optimizer": off, "offload_param": off, "zero_quantized_weights": False}
        fp16 = {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16}
        refuse_deepspeed(configuration(zero_optimization=zero, fp16=fp16, zenflow=None), XSAMConfig())

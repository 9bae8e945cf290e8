"""DistributedDataParallel and FSDP2 over NCCL, in one process, against the model alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_distributed import SAVING, XSAM, assert_close, case

SCRIPT = Path(__file__).parent / "nccl_run.py"
EXACT, DIFFERENCE = {**XSAM, "hvp": "exact"}, {**XSAM, "hvp": "finite_difference"}


def launch(cases, folder):
    """Run the cases in one process under torchrun, and return what each gave."""
    specification, output = folder / "cases.json", folder / "results.pt"
    specification.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc_per_node=1", str(SCRIPT), str(specification), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=140)
    assert result.returncode == 0, result.stderr[-5000:]
    return torch.load(output)


def gpu_case(config, arguments=(), **settings):
    return case(config, 1, arguments={"use_cpu": False, **dict(arguments)}, **settings)


class TestEqualsTheModelAlone:
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory):
        cases = {
            "exact alone": gpu_case(EXACT, strategy="alone"),
            "difference alone": gpu_case(DIFFERENCE, strategy="alone"),
            "exact ddp": gpu_case(EXACT, strategy="ddp"),
            "difference ddp": gpu_case(DIFFERENCE, strategy="ddp"),
            "difference fsdp2": gpu_case(DIFFERENCE, strategy="fsdp2"),
            "auto fsdp2": gpu_case(XSAM, strategy="fsdp2"),
            "bf16 fsdp2": gpu_case(XSAM, {"bf16": True}, strategy="fsdp2", dtype="float32"),
            "bf16 ddp": gpu_case(XSAM, {"bf16": True}, strategy="ddp", dtype="float32"),
        }
        return launch(cases, tmp_path_factory.mktemp("nccl"))

    def test_ran_on_the_gpu(self, results):
        for result in results.values():
            assert "nccl" in result["backend"]
            assert all(part.is_cuda for part in result["weights"].values())
        assert results["exact ddp"]["gradient_all_reduces"] > 0
        assert results["exact alone"]["gradient_all_reduces"] == 0
        assert results["difference fsdp2"]["units"] > 1

    @pytest.mark.parametrize("strategy", ["exact ddp", "difference ddp", "difference fsdp2"])
    def test_weights_and_eigenvector(self, results, strategy):
        hvp = strategy.split()[0]
        ours, alone, tolerance = results[strategy], results[f"{hvp} alone"], 1e-9 if hvp == "exact" else 1e-6
        assert_close(ours["weights"], alone["weights"], tolerance)
        assert_close(ours["eigenvector"], alone["eigenvector"], tolerance * 1e3)
        assert ours["top_eigenvalue"] == pytest.approx(alone["top_eigenvalue"], rel=1e-3)

    @pytest.mark.parametrize(
        ("name", "method"),
        [("exact ddp", "exact"), ("bf16 ddp", "exact"), ("auto fsdp2", "finite_difference")],
    )
    def test_the_kind_of_product(self, results, name, method):
        assert results[name]["method"] == method

    @pytest.mark.parametrize("name", ["bf16 ddp", "bf16 fsdp2"])
    def test_mixed_precision(self, results, name):
        assert math.isfinite(results[name]["eigenvalue"])
        expected = results["exact alone"]["weights"]
        assert_close({key: part.double() for key, part in results[name]["weights"].items()}, expected, 0.01)


class TestResume:
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_equals_the_uninterrupted_run(self, tmp_path, strategy):
        config, folder = {**XSAM, "eigen_interval": 100}, tmp_path / "checkpoints"
        settings = {"strategy": strategy, "model": "dropout", "dtype": "float32", "folder": str(folder)}
        cases = {
            "whole": gpu_case(config, SAVING, **settings),
            "resumed": gpu_case(
                config, {**SAVING, "save_strategy": "no"}, resume=str(folder / "checkpoint-2"), **settings
            ),
        }
        results = launch(cases, tmp_path)
        assert results["resumed"]["step"] == results["whole"]["step"] == 4
        assert_close(results["resumed"]["eigenvector"], results["whole"]["eigenvector"], 0)
        assert_close(results["resumed"]["weights"], results["whole"]["weights"], 1e-6)

"""Two processes (gloo) against one with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "distributed_run.py"


def train(processes, folder, *flags):
    output = folder / f"weights{processes}.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run([*command, str(SCRIPT), str(output), *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(output)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_global_ascent_equals_one_process(tmp_path, hvp):
    one, two = train(1, tmp_path, hvp, "global"), train(2, tmp_path, hvp, "global")
    tolerance = 1e-9 if hvp == "exact" else 1e-6
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=tolerance)
    assert two["logs"]["xsam/perturbed_loss"] == pytest.approx(one["logs"]["xsam/perturbed_loss"], abs=1e-6)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_local_ascent_keeps_the_ranks_together(tmp_path, hvp):
    result = train(2, tmp_path, hvp, "local")
    assert result["ranks_agree"]
    assert any(
        not torch.equal(weight, other)
        for weight, other in zip(
            result["weights"].values(), train(1, tmp_path, hvp, "local")["weights"].values(), strict=True
        )
    )

"""`step_cost.py --device cuda`: what it needs, and its table. tests/gpu runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cost import table
from pages import markdown

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
NOT_NEEDED = ("datasets", "pytorch_optimizer", "sklearn", "trl")


def test_needs_no_package_of_the_other_workloads():
    script = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); [sys.modules.update({{n: None}}) for n in {NOT_NEEDED}]"
    )
    subprocess.run([sys.executable, "-c", f"{script}; import step_cost, gpu_cost"], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, BENCHMARKS / "step_cost.py", "--device", "cuda", "--output", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "--device is cuda, but torch.cuda.is_available() is False" in result.stderr


def test_the_table():
    contenders = {
        "stock Trainer": {"seconds": [0.01, 0.02, 0.03], "peak_bytes": 2**30},
        "SAM": {"seconds": [0.04], "peak_bytes": 3 * 2**30},
        "X-SAM, authors' policy": None,
    }
    lines = markdown(table({"bert": {"contenders": contenders}})).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [
        ["bert", "stock Trainer", "20.0 ms", "1.00", "0.50", "1.00 GiB", "1.00"],
        ["bert", "SAM", "40.0 ms", "2.00", "1.00", "3.00 GiB", "3.00"],
        ["bert", "X-SAM, authors' policy", "", "", "", "out of memory", ""],
    ]

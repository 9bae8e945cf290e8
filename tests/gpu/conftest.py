"""Every test in this folder has the marker `gpu`, and is skipped without a CUDA GPU."""

import os
from pathlib import Path

# cuBLAS reads it once. With it, and torch.use_deterministic_algorithms, products are the same bit for bit in every run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from transformers import TrainingArguments

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch):
    """A process that sees several GPUs would take them by DataParallel, which X-SAM refuses."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)


@pytest.fixture
def deterministic():
    """Kernels that give the same bit for bit, in every run; one that cannot raises an error."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

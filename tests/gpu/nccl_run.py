"""Run by test_nccl.py under torchrun, in one process: the cases of distributed_run.py, on a GPU by NCCL."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from accelerate import DistributedType, PartialState

from tests import distributed_run


def wrapped_train(train, case, folder):
    """Have Accelerate treat one process as it does several, which it else wraps no model for; not a case "alone"."""
    alone = case.get("strategy") == "alone"
    PartialState.use_distributed = property(lambda self: not alone and self.distributed_type != DistributedType.NO)
    return {**train(case, folder), "backend": torch.distributed.get_backend()}


if __name__ == "__main__":
    distributed_run.train = partial(wrapped_train, distributed_run.train)
    distributed_run.main()

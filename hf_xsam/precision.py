"""Mixed precision: the factor on the losses, and the dtype that they are computed in."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def loss_scale(accelerator: Accelerator) -> Tensor:
    """Return the factor that the GradScaler has on losses and gradients, 0-dimensional; 1 without one."""
    one = torch.ones((), device=accelerator.device)
    return one if accelerator.scaler is None else accelerator.scaler.scale(one)


def coarsest_dtype(accelerator: Accelerator, parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the coarsest dtype that the loss is computed in."""
    autocast = AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    return autocast or max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)

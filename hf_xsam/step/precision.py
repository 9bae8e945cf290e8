"""Mixed precision: the factor on the losses, and the dtype that they are computed in."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def loss_scale(accelerator: Accelerator) -> Tensor:
    """Return the factor that the GradScaler has on losses and gradients, 0-dimensional; 1 without one."""
    one = torch.ones((), device=accelerator.device)
    return one if accelerator.scaler is None else accelerator.scaler.scale(one)


def coarsest_dtype(accelerator: Accelerator, model: nn.Module) -> torch.dtype:
    """Return the coarsest dtype that the loss of `model` is computed in, by its weights and the mixed precision.

    Frozen weights count: PEFT keeps adapters in float32 though the base model computes in bfloat16. Those of less than
    16 bits are stored so, but not computed with.
    """
    autocast = AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    return autocast or max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

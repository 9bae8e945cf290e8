"""Mixed precision: the factor on the losses, the dtype that they are computed in, and what is left of an overflow."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..functional.tensors import norm
from .replay import Replay, gradients

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


def holds_everywhere(accelerator: Accelerator, condition: Tensor) -> bool:
    """Return whether `condition`, 0-dimensional, holds on every process: they have to go the same way."""
    if accelerator.num_processes > 1:
        return bool(accelerator.reduce(condition.float(), reduction="mean") == 1)
    return bool(condition)


def all_finite(accelerator: Accelerator, values: Iterable[Tensor]) -> bool:
    """Return whether all 0-dimensional `values` are finite, on every process."""
    finite = torch.isfinite(torch.stack([value.to(accelerator.device) for value in values])).all()
    return holds_everywhere(accelerator, finite)


def leave_harmless_gradient(replay: Replay, parameters: Sequence[Tensor]) -> None:
    """Leave in `.grad` what does no harm, in place of a corrected gradient that would not be finite.

    With a GradScaler: infinity, at which it skips the step and lowers its scale. Else the stock Trainer's gradient, or
    where that is not finite none at all, so that the optimizer leaves the weights and its state.
    """
    if replay.accelerator.scaler is not None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.inf)
    elif not all_finite(replay.accelerator, [replay.run(), norm(gradients(parameters))]):
        replay.model.zero_grad()

"""The echo check: a step run again at the same weights gives the same loss and gradient, or a warning names what moved.

Nobody can foresee all state that a training step may read; this finds what X-SAM does not put back.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..functional.tensors import local, norm
from .gradients import gradients
from .precision import coarsest_dtype
from .processes import all_finite, holds_everywhere
from .random_state import Generator, state_of
from .reachable import CONSTANT, reachable
from .replay import Window
from .side_effects import sums

logger = logging.getLogger(__name__)

Marks = Mapping[str, Any]

# How far from the trainer or a module state is looked for.
DEPTH = 4
# Kernels that are not deterministic, and sums over processes in another order, differ by rounding: relative, and in
# units of the precision that the loss is computed in.
ROUNDING, ROUNDING_STEPS = 1e-3, 4


def marks_of(owners: Mapping[str, Any]) -> Marks:
    """Return by name what shows a change of each thing that can be reached from `owners`."""
    marks: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in reachable(owners, DEPTH):
        if isinstance(value, CONSTANT):
            marks[name] = repr(value)
        elif isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, np.ndarray):
            marks[name] = hash(value.tobytes())
        elif isinstance(value, Generator):
            marks[name] = hash(repr(state_of(value)))
    return marks | dict(zip(tensors, map(repr, sums(tensors.values()).tolist()), strict=True))


def check_echo(window: Window, parameters: Sequence[Tensor], synchronize: bool, marks: Marks) -> bool:
    """Run the window once more at the same weights; warn where loss or gradient are not those of its first passes.

    On an accelerator, and with several processes, a difference within rounding is none, nor is one that is within what
    two further runs differ by.

    Args:
        window: after its first passes, whose gradient is in `.grad` and stays there.
        parameters: the trainable ones.
        synchronize: whether gradients are averaged over the processes.
        marks: of what the window's steps can reach, before the first of them.

    Returns:
        Whether it could be checked: not where the loss or the gradient is not finite.
    """
    accelerator = window.accelerator
    first = [window.loss, *gradients(parameters)]
    if not all_finite(accelerator, [norm(first)]):
        return False
    with window.gradients_set_aside():
        again = _run(window, parameters, synchronize)
        if holds_everywhere(accelerator, _all_equal(first, again)):
            return True
        window.before.restore()
        assert window.surroundings is not None  # else the window could not run again
        moved = sorted(name for name, mark in marks_of(window.surroundings.owners).items() if marks.get(name) != mark)
        difference = _difference(first, again)
        if accelerator.device.type != "cpu" or accelerator.num_processes > 1:
            noise = _difference(again, _run(window, parameters, synchronize))
            eps = torch.finfo(coarsest_dtype(accelerator, window.model)).eps
            if difference <= max(ROUNDING, ROUNDING_STEPS * eps, 2 * noise):
                return True
    if accelerator.is_main_process:
        _warn(difference, moved)
    return True


def _warn(difference: float, moved: Sequence[str]) -> None:
    logger.warning(
        "A training step that is run again at the same weights gives another loss or gradient (relative difference "
        "%.2g). Between the passes has changed: %s. X-SAM compares passes of one step, so its steps are not what they "
        "should be: keep such state in buffers or plain attributes of modules, and random numbers in generators that "
        "the model or the trainer holds.",
        difference,
        ", ".join(moved[:5]) or "nothing that the model or the trainer holds",
    )


def _run(window: Window, parameters: Sequence[Tensor], synchronize: bool) -> list[Tensor]:
    loss = window.run(synchronize)
    return [loss, *gradients(parameters)]


def _all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    pairs = zip(map(local, one), map(local, other), strict=True)
    return torch.stack([(x == y).all().to(one[0].device) for x, y in pairs]).all()


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the distance, relative to the first's length."""
    return (norm([x - y for x, y in zip(one, other, strict=True)]) / norm(one)).item()

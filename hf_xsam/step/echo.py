"""The echo check: a step run again at the same weights gives the same loss and gradient, or a warning names what moved.

Nobody can foresee all state that a training step may read; this finds what X-SAM does not put back.
"""

import itertools
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..functional.tensors import local, norm
from .gradients import gradients
from .kept_tensors import KeptTensors
from .moving_weights import sums
from .precision import coarsest_dtype
from .processes import all_finite, holds_everywhere
from .random_state import Generator, state_of
from .reachable import CONSTANT
from .replay import Window
from .side_effects import Surroundings

logger = logging.getLogger(__name__)

Marks = Mapping[str, Any]

# Kernels that are not deterministic, and sums over processes in another order, differ by rounding: relative, and in
# units of the precision that the loss is computed in.
ROUNDING, ROUNDING_STEPS = 1e-3, 4


def marks_of(surroundings: Surroundings) -> Marks:
    """Return by name what shows a change of each thing that training steps can reach."""
    marks: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in surroundings.reachable():
        if isinstance(value, CONSTANT):
            marks[name] = repr(value)
        elif isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, np.ndarray):
            marks[name] = hash(value.tobytes())
        elif isinstance(value, Generator):
            marks[name] = hash(repr(state_of(value)))
        elif isinstance(value, Iterator):
            marks[name] = _place_of(value)
    return marks | dict(zip(tensors, map(repr, sums(tensors.values()).tolist()), strict=True))


def _place_of(iterator: Iterator[Any]) -> str:
    """Return what shows how far an iterator has come, of those that say so."""
    frame = getattr(iterator, "gi_frame", None)  # of a generator function's
    place = None if frame is None else (frame.f_lasti, frame.f_locals)
    return repr((operator.length_hint(iterator, -1), iterator if isinstance(iterator, itertools.count) else place))


def check_echo(window: Window, parameters: Sequence[Tensor], synchronize: bool, marks: Marks) -> bool:
    """Run the window once more at the same weights; warn once where loss or gradient are not its first passes'.

    On an accelerator, and with several processes, a difference within rounding is none. Nor is one that is within what
    two further runs differ by, where nothing is seen to have changed between the passes.

    Args:
        window: after its first passes, whose gradient is in `.grad` and stays there.
        parameters: the trainable ones.
        synchronize: whether gradients are averaged over the processes.
        marks: of what the window's steps can reach, before the first of them.

    Returns:
        Whether it could be checked: not where the loss or the gradient is not finite.
    """
    accelerator, surroundings = window.accelerator, window.surroundings
    assert surroundings is not None  # else the window could not run again
    first = [window.loss, *gradients(parameters)]
    if not all_finite(accelerator, [norm(first)]):
        return False
    weights = KeptTensors(surroundings.moving)

    def run_again() -> list[Tensor]:
        loss = window.run(synchronize)
        weights.restore()
        return [loss, *gradients(parameters)]

    with window.gradients_set_aside():
        again = run_again()
        if holds_everywhere(accelerator, _all_equal(first, again)):
            return True
        window.before.restore()
        here = {name for name, mark in marks_of(surroundings).items() if marks.get(name) != mark}
        moved = set().union(*gather_object([here]))  # on one process as it is
        difference = _largest_difference(accelerator, first, again)
        if accelerator.device.type != "cpu" or accelerator.num_processes > 1:
            # What moves from pass to pass would make noise of any size.
            noise = 0.0 if moved else _largest_difference(accelerator, again, run_again())
            eps = torch.finfo(coarsest_dtype(accelerator, window.model)).eps
            if difference <= max(ROUNDING, ROUNDING_STEPS * eps, 2 * noise):
                return True
    if accelerator.is_main_process and not surroundings.warned:
        _warn(difference, sorted(moved))
    surroundings.warned = True
    return True


def _warn(difference: float, moved: Sequence[str]) -> None:
    logger.warning(
        "A training step that is run again at the same weights gives another loss or gradient (relative difference "
        "%.2g). Between the passes has changed: %s. X-SAM compares passes of one step, so its steps are not what they "
        "should be: keep such state in buffers, or in plain attributes of modules if a tensor has at most 4 million "
        "elements, and random numbers in generators that the model or the trainer holds.",
        difference,
        ", ".join(moved[:5]) or "nothing that the model or the trainer holds",
    )


def _all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    pairs = zip(map(local, one), map(local, other), strict=True)
    return torch.stack([(x == y).all().to(one[0].device) for x, y in pairs]).all()


def _largest_difference(accelerator: Accelerator, one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the distance, relative to the first's length: the largest of all processes', which go the same way."""
    distance = norm([x - y for x, y in zip(one, other, strict=True)]) / norm(one)
    return accelerator.gather(distance.to(accelerator.device)).max().item()

"""What training steps leave behind beside gradients, found, and undone so that each step counts once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..functional.tensors import is_sharded, local
from .kept_state import KeptState
from .random_state import RandomState, devices_of, private_generators

# Over how many steps frozen weights are compared with what they were; later ones show by their version or storage.
WATCHED_STEPS = 3


class Surroundings:
    """What the training steps of one model draw from and write into, beside gradients.

    Args:
        model: without wrappers.
        device: that steps run on.
        trainer: whose attributes count too, and the modules among them: a loss's, a reference model's.
    """

    def __init__(self, model: nn.Module, device: torch.device, trainer: Any = None) -> None:
        self.owners = owners_of(model, trainer)
        self._devices = devices_of(model, device)
        self._generators = private_generators(self.owners)
        modules = [owner for owner in self.owners.values() if isinstance(owner, nn.Module)]
        self._frozen = FrozenWeights(p for module in modules for p in module.parameters(recurse=False))

    def random_state(self) -> RandomState:
        """Return the state of all random generators."""
        return RandomState.capture(self._devices, self._generators)

    def before_step(self) -> KeptState:
        """Return the state that a step begins with."""
        return KeptState(self.owners.values(), self._frozen.to_keep())

    @contextmanager
    def undone(self) -> Iterator["Moment"]:
        """Undo what passes within the block do: batch norm's statistics, say, then move once an optimizer step.

        Yields:
            The moment before the block, to go back to from within.
        """
        moment = Moment(self.random_state(), KeptState(self.owners.values(), self._frozen.to_undo()))
        try:
            yield moment
        finally:
            moment.restore()


class Moment:
    """Random state and other state at one time."""

    def __init__(self, random_state: RandomState, state: KeptState) -> None:
        self._random_state, self._state = random_state, state

    def restore(self) -> None:
        """Go back to it."""
        self._random_state.restore()
        self._state.restore()


class FrozenWeights:
    """The weights that take no gradient, and those of them that training steps move: a momentum encoder's, say.

    Args:
        weights: all parameters, trainable ones too.

    Attributes:
        moving: those found so far.
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        every = {id(weight): weight for weight in weights if not is_sharded(weight)}.values()
        self._weights = [weight for weight in every if not weight.requires_grad]
        # A copy of all of them is taken while they are watched, if it is no larger than a momentum encoder.
        trainable = sum(weight.nbytes for weight in every if weight.requires_grad)
        self._few = sum(weight.nbytes for weight in self._weights) <= 2 * trainable
        self._steps = 0
        self._marks: list[tuple[int, int]] | None = None
        self.moving: list[Tensor] = []

    def to_keep(self) -> list[Tensor]:
        """Begin to watch a step; return the weights whose values it may change."""
        self._marks = self._read_marks()
        self._sums = self._read_sums() if self._steps < WATCHED_STEPS else None
        return list(self._weights) if self._few and self._steps < WATCHED_STEPS else self.moving

    def to_undo(self) -> list[Tensor]:
        """Return the weights that further passes may change: those which the step under way has, if there is one."""
        if self._marks is None:
            return self.to_keep()
        marks = zip(self._read_marks(), self._marks, strict=True)
        moved = {number for number, (now, before) in enumerate(marks) if now != before}
        if self._sums is not None:
            moved.update((self._read_sums() != self._sums).nonzero().flatten().tolist())
        known = set(map(id, self.moving))
        self.moving = self.moving + [self._weights[i] for i in sorted(moved) if id(self._weights[i]) not in known]
        self._steps += 1
        return self.moving

    def _read_marks(self) -> list[tuple[int, int]]:
        return [(weight._version, weight.data_ptr()) for weight in self._weights]

    def _read_sums(self) -> Tensor:
        return sums(self._weights)


def sums(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of each tensor, by which a change shows, on the CPU in float64."""
    found = [x.sum(dtype=torch.float32 if x.is_mps else torch.float64).cpu() for x in map(local, tensors)]
    return torch.stack(found).double() if found else torch.zeros(0)


def owners_of(model: nn.Module, trainer: Any = None) -> dict[str, Any]:
    """Return by name what has attributes that training steps may change: modules, and the trainer."""
    owners: dict[str, Any] = dict(model.named_modules())
    if trainer is None:
        return owners
    known = {id(module) for module in owners.values()}
    for attribute, value in vars(trainer).items():
        if isinstance(value, nn.Module) and attribute not in ("model", "model_wrapped"):
            inner = {f"trainer.{attribute}.{name}".rstrip("."): module for name, module in value.named_modules()}
            owners |= {name: module for name, module in inner.items() if id(module) not in known}
    return {**owners, "trainer": trainer}


@contextmanager
def logs_dropped(trainer: Any) -> Iterator[None]:
    """Drop what losses computed within the block log with `trainer.log`: the step's own has logged it."""
    with replaced(trainer, "log", lambda *args, **kwargs: None):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have the attribute `name` of the object `owner` be `value` within the block."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def copied(inputs: Any) -> Any:
    """Return a batch like `inputs` with tensors of its own: a step may change them in place, or take `labels` out."""
    return recursively_apply(torch.clone, copy(inputs))

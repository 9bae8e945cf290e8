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
        self._frozen.begin_step()
        return KeptState(self.owners.values(), self._frozen.candidates())

    @contextmanager
    def undone(self) -> Iterator["Moment"]:
        """Undo what passes within the block do: batch norm's statistics, say, then move once an optimizer step.

        Yields:
            The moment before the block, to go back to from within.
        """
        self._frozen.note_marked()
        self._frozen.note_moved()
        moment = Moment(self.random_state(), KeptState(self.owners.values(), self._frozen.candidates()))
        try:
            yield moment
        finally:
            self._frozen.note_moved()  # a teacher that is the student's equal moves at perturbed weights alone
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
        weights: all parameters, trainable ones too. Those of ZeRO-3 come and go, and are left out.

    Attributes:
        moving: those found so far.
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        every = {
            id(weight): weight for weight in weights if not is_sharded(weight) and not hasattr(weight, "ds_tensor")
        }.values()
        self._weights = [weight for weight in every if not weight.requires_grad]
        # A copy of all of them is taken while they are watched, if it is no larger than a momentum encoder.
        trainable = sum(weight.nbytes for weight in every if weight.requires_grad)
        self._few = sum(weight.nbytes for weight in self._weights) <= 2 * trainable
        self._steps = 0
        self._marks, self._sums = self._read_marks(), torch.zeros(0)
        self.moving: list[Tensor] = []

    def begin_step(self) -> None:
        """Begin to watch a step."""
        self._steps += 1
        self._marks = self._read_marks()
        if self._is_watched:
            self._sums = sums(self._weights)

    def candidates(self) -> list[Tensor]:
        """Return the weights whose values the passes to come may change."""
        return list(self._weights) if self._few and self._is_watched else self.moving

    def note_marked(self) -> None:
        """Find out by version and memory which weights the step's first passes have moved."""
        marks = zip(self._read_marks(), self._marks, strict=True)
        self._add({number for number, (now, before) in enumerate(marks) if now != before})

    def note_moved(self) -> None:
        """While they are watched, find out by their sums which weights have moved since this was last asked."""
        if self._steps and self._is_watched:
            now = sums(self._weights)
            self._add(set((now != self._sums).nonzero().flatten().tolist()))
            self._sums = now

    def _add(self, moved: set[int]) -> None:
        known = set(map(id, self.moving))
        self.moving = self.moving + [self._weights[i] for i in sorted(moved) if id(self._weights[i]) not in known]

    @property
    def _is_watched(self) -> bool:
        return self._steps <= WATCHED_STEPS

    def _read_marks(self) -> list[tuple[int, int]]:
        return [(weight._version, weight.data_ptr()) for weight in self._weights]


def sums(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of each tensor and, of floating-point ones, their norm, by which changes show; on the CPU."""
    return torch.tensor([_sum_and_norm(tensor) for tensor in map(local, tensors)], dtype=torch.float64)


def _sum_and_norm(tensor: Tensor) -> float:
    dtype = torch.float32 if tensor.is_mps else torch.float64
    total = tensor.sum(dtype=dtype)
    # A movement along which the sum stays is not rare: a classifier's biases.
    if tensor.is_floating_point() and tensor.layout == torch.strided:
        total = total + torch.linalg.vector_norm(tensor, dtype=dtype)
    return total.item()


def owners_of(model: nn.Module, trainer: Any = None) -> dict[str, Any]:
    """Return by name what has attributes that training steps may change: modules, and the trainer."""
    owners: dict[str, Any] = dict(model.named_modules())
    if trainer is None:
        return owners
    known = {id(module) for module in owners.values()}
    for attribute, value in vars(trainer).items():
        if isinstance(value, nn.Module) and attribute not in ("model", "model_wrapped", "deepspeed"):
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

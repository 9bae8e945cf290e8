"""What training steps leave behind beside gradients, found, and undone so that each step counts once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from .kept_state import KeptState, Names, held_by_classes
from .kept_tensors import KeptTensors
from .moving_weights import FrozenWeights, MovingWeights
from .random_state import RandomState, devices_of, private_generators
from .reachable import reachable


class Surroundings:
    """What the training steps of one model draw from and write into, beside gradients.

    Args:
        model: without wrappers.
        device: that steps run on.
        trainer: whose attributes count too, and the modules among them: a loss's, a reference model's.

    Attributes:
        warned: whether it was said that a step run again is not the same.
    """

    def __init__(self, model: nn.Module, device: torch.device, trainer: Any = None) -> None:
        self._left_out = _wrappers(trainer)
        self.owners = owners_of(model, trainer, self._left_out)
        self.warned = False
        self._names: Names = {}
        self._of_classes = held_by_classes(self.owners.values())
        self._devices = devices_of(model, device)
        self._generators = {id(generator): generator for generator in private_generators(self.owners)}
        trainable = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
        modules = [owner for owner in self.owners.values() if isinstance(owner, nn.Module)]
        frozen = (p for module in modules for p in module.parameters(recurse=False) if id(p) not in trainable)
        # Quantized weights are of classes of their own: they are only read, or repacked with state beside them.
        others = [p for p in frozen if type(p) is nn.Parameter and p.is_floating_point()]
        self._trainable_ids = trainable.keys()
        self._trainable = MovingWeights(trainable.values())
        self._frozen = FrozenWeights(others, sum(parameter.nbytes for parameter in trainable.values()))
        self._start: KeptTensors | None = None

    @property
    def moving(self) -> list[Tensor]:
        """The trainable weights that the forward passes move."""
        return self._trainable.moving

    def is_of(self, trainable: Iterable[nn.Parameter]) -> bool:
        """Return whether these are the parameters that took gradients when it was found: none was frozen since."""
        return self._trainable_ids == set(map(id, trainable))

    def reachable(self) -> Iterator[tuple[str, Any]]:
        """Yield what steps can reach, by name."""
        return reachable(self.owners, self._left_out)

    def random_state(self) -> RandomState:
        """Return the state of all random generators."""
        return RandomState.capture(self._devices, self._generators.values())

    def before_step(self) -> "Moment":
        """Return the state that a step begins with, but for random generators and trainable weights."""
        self._frozen.begin_step()
        self._trainable.begin_step()
        # Which of them the first step moves is known after it; the optimizer's own memory comes later.
        self._start = KeptTensors(self._trainable.weights if self._trainable.steps == 1 else self.moving)
        return Moment(self._state(), KeptTensors(self._frozen.candidates()))

    @contextmanager
    def undone(self) -> Iterator["Moment"]:
        """Undo what passes within the block do: batch norm's statistics, say, then move once an optimizer step.

        Trainable weights that the passes move are within the block as they were when the step began.

        Yields:
            The moment before the block, to go back to from within.
        """
        self._frozen.note_moved()
        self._trainable.note_moved()
        random_state, left = self.random_state(), KeptTensors(self.moving)
        if self._start is not None and self.moving:
            self._start.restore()
        self._start = None
        weights = KeptTensors([*self.moving, *self._frozen.candidates()])
        moment = Moment(random_state, self._state(), weights)
        try:
            yield moment
        finally:
            self._frozen.note_moved()  # a teacher that is the student's equal moves at perturbed weights alone
            moment.restore()
            left.restore()

    def _state(self) -> KeptState:
        state = KeptState(list(self.owners.values()), self._of_classes, self._left_out, self._names)
        self._generators |= {id(generator): generator for generator in state.generators}
        return state


class Moment:
    """Parts of what steps write into at one time."""

    def __init__(self, *parts: RandomState | KeptState | KeptTensors) -> None:
        self._parts = parts

    def restore(self) -> None:
        """Go back to it."""
        for part in self._parts:
            part.restore()


def owners_of(model: nn.Module, trainer: Any = None, left_out: Sequence[Any] = ()) -> dict[str, Any]:
    """Return by name what has attributes that training steps may change: modules, and the trainer.

    Modules that lists and other objects hide from `named_modules` are among them.
    """
    owners: dict[str, Any] = dict(model.named_modules())
    if trainer is not None:
        owners["trainer"] = trainer
    known = {id(value) for value in (*owners.values(), *left_out)}
    for name, value in list(reachable(owners, left_out)):
        if isinstance(value, nn.Module) and id(value) not in known:
            known.add(id(value))
            owners[name] = value
    return owners


def _wrappers(trainer: Any) -> list[nn.Module]:
    """Return what the trainer's model is wrapped in."""
    return [module for name in ("model", "model_wrapped") if (module := getattr(trainer, name, None)) is not None]


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

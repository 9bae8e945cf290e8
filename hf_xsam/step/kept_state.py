"""What a training step changes in the model and the trainer beside gradients, kept so that it can be put back.

Buffers, attributes of modules and of the trainer, and what these hold: containers, arrays, helper objects, random
generators. Weights that a forward pass moves are in `moving_weights`, the generators that all code shares in
`random_state`.
"""

import array
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .containers import elements_of, refill
from .kept_tensors import KeptTensors
from .random_state import Generator, set_state, state_of
from .reachable import (
    CONSTANT,
    DEPTH,
    LARGEST_CONTAINER,
    MOST,
    OF_EVERY_MODULE,
    attributes_of,
    counts,
    hooks_of,
    is_library,
    slot_values,
    slots_of,
)

# Larger tensors that are no buffers are left as they are; the elements of larger containers are not looked into.
LARGEST_TENSOR, FEW = 2**22, 1_000
# Larger buffers of integers may be quantized weights, whatever they are called.
INTEGERS, LARGEST_COUNTS = (torch.int8, torch.uint8, torch.int16, torch.int32), 2**16
# What is stepped, moved on or read outside of the passes; what threads share.
LEFT_OUT = (Enum, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.utils.data.Dataset)
LOCKS = frozenset((type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.Condition))
ABSENT = object()

Keep = Callable[["KeptState", Any], Iterable[Any]]
Names = dict[int, tuple[Any, int, str, tuple[str, ...]]]
NOT_KNOWN = (None, 0, "", ())


class KeptState:
    """The state of some objects at one time.

    Of each attribute it is kept which object it was; where that can change within, its contents are kept too, to a
    depth of `reachable.DEPTH`. Quantized weights in buffers are not: they may be most of a model, and are only read.

    Args:
        owners: modules, and other objects whose attributes count.
        others: values whose contents count, such as those that classes hold.
        left_out: objects that do not.
        names: what modules call their own attributes, found when their state was last kept, and now.

    Attributes:
        generators: the random generators found.
    """

    def __init__(
        self,
        owners: Sequence[Any],
        others: Iterable[Any] = (),
        left_out: Iterable[Any] = (),
        names: Names | None = None,
    ) -> None:
        self._names: Names = {} if names is None else names
        self.generators: list[Generator] = []
        self._random: list[Any] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any], int]] = []
        self._slots: list[tuple[Any, dict[MemberDescriptorType, Any]]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._found: list[Tensor] = []
        self._seen = {id(value) for value in (*owners, *left_out)}
        level = [*others]
        for owner in owners:
            level += self._module(owner) if isinstance(owner, nn.Module) else self._object(owner)
        for _ in range(DEPTH):
            level = [part for value in level for part in self._keep(value) if HOW[type(part)]]
        self._tensors = KeptTensors(self._found)

    def restore(self) -> None:
        """Put everything back as it was, whether a pass wrote into an object or put another one in its place."""
        for now, before, length in self._attributes:
            for name, value in before.items():
                if now.get(name, ABSENT) is not value:
                    now[name] = value
            if len(now) != length:
                for name in now.keys() - before.keys():
                    if counts(name):
                        del now[name]
        for owner, held in self._slots:
            for slot in slots_of(owner):
                if slot in held:
                    slot.__set__(owner, held[slot])
            for slot in [slot for slot, _ in slot_values(owner) if slot not in held]:
                slot.__delete__(owner)
        for cell, value in self._cells:
            cell.cell_contents = value
        for container, elements in self._containers:
            refill(container, elements)
        for kept, values in self._arrays:
            if kept.shape != values.shape:
                kept.resize(values.shape, refcheck=False)
            kept[...] = values
        for generator, state in zip(self.generators, self._random, strict=True):
            set_state(generator, state)
        self._tensors.restore()

    def _keep(self, value: Any) -> Iterable[Any]:
        """Keep what can change within `value`; return its parts."""
        keep = HOW[type(value)]
        if keep is None or id(value) in self._seen or len(self._seen) > MOST:
            return ()
        self._seen.add(id(value))
        return keep(self, value)

    def _module(self, module: nn.Module) -> list[Any]:
        held, buffers = vars(module), module._buffers
        own = {name: held[name] for name in self._names_in(module, held)}
        self._attributes.append((held, own, len(held)))
        if buffers:
            self._attributes.append((buffers, buffers.copy(), len(buffers)))
            for name, buffer in buffers.items():
                if buffer is not None and id(buffer) not in self._seen and not _is_quantized_weight(name, buffer):
                    self._seen.add(id(buffer))
                    self._found.append(buffer)
        parts = [value for value in own.values() if HOW[type(value)]]
        if (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
        ):
            parts += hooks_of(module)
        return parts

    def _names_in(self, module: nn.Module, held: dict[str, Any]) -> tuple[str, ...]:
        last = next(reversed(held))
        whose, length, known, names = self._names.get(id(module), NOT_KNOWN)
        if whose is not module or length != len(held) or known != last:  # a new name is the last one
            names = tuple(name for name in held if name not in OF_EVERY_MODULE)
            self._names[id(module)] = module, len(held), last, names
        return names

    def _hidden_module(self, module: nn.Module) -> list[Any]:
        return [*self._module(module), *module._modules.values()]

    def _object(self, value: Any) -> list[Any]:
        held = attributes_of(value)
        own = {name: part for name, part in held.items() if counts(name)}
        if not LOCKS.isdisjoint(map(type, own.values())):
            return []
        self._attributes.append((held, own, len(held)))
        parts = list(own.values())
        if slots_of(value):
            slots = dict(slot_values(value))
            self._slots.append((value, slots))
            parts += slots.values()
        return parts

    def _container(self, value: Any) -> Iterable[Any]:
        if len(value) > LARGEST_CONTAINER:
            return ()
        elements = elements_of(value)
        self._containers.append((value, elements))
        parts = elements.values() if isinstance(elements, dict) else elements
        parts = list(parts) if len(elements) <= FEW else []
        return parts if type(value).__module__ in ("builtins", "collections") else parts + self._object(value)

    def _plain_container(self, value: Any) -> Iterable[Any]:
        self._containers.append((value, value[:]))
        return ()

    def _function(self, function: FunctionType) -> list[Any]:
        parts = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # none yet
                continue
            self._cells.append((cell, value))
            parts.append(value)
        return parts + self._object(function)

    def _tensor(self, tensor: Tensor) -> Iterable[Any]:
        # Those of ZeRO-3 come and go, and DeepSpeed notes itself which are there.
        weight = isinstance(tensor, nn.Parameter) and (
            tensor.requires_grad or not tensor.is_floating_point() or hasattr(tensor, "ds_tensor")
        )
        if not weight and tensor.grad_fn is None and tensor.numel() <= LARGEST_TENSOR:
            self._found.append(tensor)
        return ()

    def _array(self, value: np.ndarray) -> Iterable[Any]:
        if value.size <= LARGEST_TENSOR and value.flags.writeable:
            self._arrays.append((value, value.copy()))
            if value.dtype == object and value.size <= FEW:
                return list(value.flat)
        return ()

    def _generator(self, generator: Generator) -> Iterable[Any]:
        self.generators.append(generator)
        self._random.append(state_of(generator))
        return ()


def _how_to_keep(kind: type) -> Keep | None:
    """Return what keeps the contents of the objects of a class; None where they have none that count."""
    if issubclass(kind, (*CONSTANT, *LEFT_OUT)):
        return None
    if kind is FunctionType:
        return lambda state, value: () if is_library(value) else state._function(value)
    kinds: tuple[tuple[Any, Keep], ...] = (
        (Tensor, KeptState._tensor),
        (nn.Module, KeptState._hidden_module),
        (np.ndarray, KeptState._array),
        (Generator, KeptState._generator),
        ((dict, list, deque, set), KeptState._container),
        ((bytearray, array.array), KeptState._plain_container),
        (tuple, lambda _, value: value if len(value) <= FEW else ()),
        (MethodType, lambda _, value: (value.__self__,)),
        (partial, lambda _, value: (value.func, *value.args, *value.keywords.values())),
    )
    for base, keep in kinds:
        if issubclass(kind, base):
            return keep
    return None if is_library(kind) else KeptState._object


class _How(dict[type, Keep | None]):
    """What keeps the contents of the objects of each class, found once."""

    def __missing__(self, kind: type) -> Keep | None:
        self[kind] = keep = _how_to_keep(kind)
        return keep


HOW = _How()


def held_by_classes(owners: Iterable[Any]) -> list[Any]:
    """Return what the classes of `owners` hold that may change within, the defaults of their methods too."""
    kinds = {kind for owner in owners for kind in type(owner).__mro__ if not is_library(kind)}
    held = [value for kind in kinds for name, value in vars(kind).items() if not name.startswith("__")]
    functions = [value for value in held if inspect.isfunction(value)]
    defaults = [[*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()] for f in functions]
    values = [value for value in held if not inspect.isfunction(value)] + [part for parts in defaults for part in parts]
    return [value for value in values if HOW[type(value)]]


def _is_quantized_weight(name: str, buffer: Tensor) -> bool:
    """Return whether it looks like the weights of a layer of AWQ, GPTQ or BitNet, which keep them in buffers."""
    named = "weight" in name or "zeros" in name
    return buffer.ndim > 1 and buffer.dtype in INTEGERS and (named or buffer.numel() > LARGEST_COUNTS)

"""The random generators that a training step may draw from: those that all code shares, and private ones."""

import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Generator = np.random.Generator | np.random.RandomState | torch.Generator | random.Random

# How far from a trainer or module a private generator is looked for, and in containers of how many elements.
DEPTH = 3
LARGEST_CONTAINER = 1000
# Packages whose classes and functions hold no generator of their own that a step draws from.
LIBRARIES = ("torch", "transformers", "accelerate", "hf_xsam", "trl", "peft", "datasets", "numpy", "builtins")


@dataclass
class RandomState:
    """The states of the generators of Python, NumPy, the CPU and devices, and of private ones."""

    python: object
    numpy: Any
    cpu: Tensor
    devices: dict[torch.device, Tensor]
    private: list[tuple[Generator, Any]]

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = (), generators: Iterable[Generator] = ()) -> "RandomState":
        """Read the shared generators, those of `devices`, and the private `generators`."""
        states = {
            device: torch.get_device_module(device).get_rng_state(*_numbered(device))
            for device in devices
            if device.type != "cpu"
        }
        private = [(generator, _state_of(generator)) for generator in generators]
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states, private)

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)  # type: ignore[arg-type]
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, *_numbered(device))
        for generator, state in self.private:
            _set_state(generator, state)


def devices_of(model: nn.Module, device: torch.device) -> set[torch.device]:
    """Return `device`, and the others that `from_pretrained(device_map=...)` has spread the model over."""
    places = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    numbered = [torch.device(device.type, place) if isinstance(place, int) else torch.device(place) for place in places]
    return {device, *numbered}


def private_generators(owners: Iterable[Any]) -> list[Generator]:
    """Return the generators of NumPy, torch and Python that `owners` hold, but for those that all code shares.

    They are looked for in attributes of the owners and of their classes, in what these hold, and in the global
    variables and closures of their functions, as far as no library has defined them.
    """
    found: dict[int, Generator] = {}
    seen: set[int] = set()
    level: list[Any] = [value for owner in owners for value in _held_by(owner)]
    for _ in range(DEPTH):
        following: list[Any] = []
        for value in level:
            if isinstance(value, Generator):
                found[id(value)] = value
            elif id(value) not in seen:
                seen.add(id(value))
                following += _within(value)
        level = following
    shared = {id(torch.default_generator), id(random._inst), id(np.random.mtrand._rand)}
    return [generator for key, generator in found.items() if key not in shared]


def _held_by(owner: Any) -> Iterator[Any]:
    """Yield the attributes of an object, and of those of its classes that no library has defined."""
    yield from vars(owner).values()
    for kind in type(owner).__mro__:
        if not _of_a_library(kind):
            yield from vars(kind).values()


def _within(value: Any) -> Sequence[Any]:
    """Return what may hold a generator in `value`."""
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= LARGEST_CONTAINER else ()
    if isinstance(value, list | tuple | set):
        return list(value) if len(value) <= LARGEST_CONTAINER else ()
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, nn.Module | Tensor | type):
        return ()
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if inspect.isfunction(function):
        return () if _of_a_library(function) else _used_by(function)
    return list(_held_by(value)) if hasattr(value, "__dict__") and not _of_a_library(type(value)) else ()


def _used_by(function: Any) -> list[Any]:
    """Return the values of a function's closure, and those of the global variables that its code names."""
    try:
        used = inspect.getclosurevars(function)
    except ValueError:  # a variable of the closure that has no value yet
        return []
    return [*used.nonlocals.values(), *used.globals.values()]


def _of_a_library(defined: Any) -> bool:
    return str(getattr(defined, "__module__", None) or "").split(".")[0] in LIBRARIES


def _numbered(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.index is None else (device,)  # MPS has one generator, and takes no device


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState | torch.Generator):
        return generator.get_state()
    return generator.getstate()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState | torch.Generator):
        generator.set_state(state)
    else:
        generator.setstate(state)

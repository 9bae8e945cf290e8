"""The random generators that a training step may draw from: those that all code shares, and private ones."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .reachable import reachable

Generator = np.random.Generator | np.random.BitGenerator | np.random.RandomState | torch.Generator | random.Random


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
        private = [(generator, state_of(generator)) for generator in generators]
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states, private)

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)  # type: ignore[arg-type]
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, *_numbered(device))
        for generator, state in self.private:
            set_state(generator, state)


def devices_of(model: nn.Module, device: torch.device) -> set[torch.device]:
    """Return `device`, and the others that `from_pretrained(device_map=...)` has spread the model over."""
    places = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    numbered = [torch.device(device.type, place) if isinstance(place, int) else torch.device(place) for place in places]
    return {device, *numbered}


def private_generators(owners: Mapping[str, Any]) -> list[Generator]:
    """Return the generators of NumPy, torch and Python that can be reached from `owners`, but for the shared ones."""
    shared = (torch.default_generator, random._inst, np.random.mtrand._rand)
    found = (value for _, value in reachable(owners) if isinstance(value, Generator))
    return [generator for generator in found if not any(generator is one for one in shared)]


def _numbered(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.index is None else (device,)  # MPS has one generator, and takes no device


def state_of(generator: Generator) -> Any:
    """Return the state of a generator, in a form of its library's."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState | torch.Generator):
        return generator.get_state()
    return generator.getstate()


def set_state(generator: Generator, state: Any) -> None:
    """Set a generator to a state that [`state_of`] has returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    elif isinstance(generator, np.random.RandomState | torch.Generator):
        generator.set_state(state)
    else:
        generator.setstate(state)

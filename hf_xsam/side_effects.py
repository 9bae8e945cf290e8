"""The random generators that forward passes draw from: read, and set back."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class RandomState:
    """The states of all random generators that a forward pass may draw from."""

    python: object
    numpy: Any
    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> "RandomState":
        """Read the generators of Python, NumPy, the CPU, and `devices`."""
        states = {
            device: torch.get_device_module(device).get_rng_state(*_numbered(device))
            for device in devices
            if device.type != "cpu"
        }
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)  # type: ignore[arg-type]
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, *_numbered(device))


def _numbered(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.index is None else (device,)  # MPS has one generator, and takes no device


def devices_of(model: nn.Module, device: torch.device) -> set[torch.device]:
    """Return `device`, and the others that `from_pretrained(device_map=...)` has spread the model over."""
    places = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    numbered = [torch.device(device.type, place) if isinstance(place, int) else torch.device(place) for place in places]
    return {device, *numbered}

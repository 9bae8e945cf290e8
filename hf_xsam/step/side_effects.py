"""What training steps leave behind beside gradients, so that they can be run again: read, set back, or dropped."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
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


@dataclass
class Buffers:
    """The buffers of a model, and the values that they had.

    Attributes:
        kept: by module and name, which tensor the buffer was, and its value.
    """

    kept: list[tuple[nn.Module, str, Tensor, Tensor]]

    @classmethod
    def capture(cls, model: nn.Module) -> "Buffers":
        """Copy the buffers of `model`, but for quantized weights, which may be most of it and are only read."""
        held = ((module, *item) for module in model.modules() for item in module._buffers.items())
        return cls(
            [
                (module, name, buffer, buffer.clone())
                for module, name, buffer in held
                if buffer is not None and not _is_quantized_weight(buffer)
            ]
        )

    def restore(self) -> None:
        """Give them their tensors and values back, whether a forward pass wrote into a tensor or put another there."""
        with torch.no_grad():
            for module, name, buffer, value in self.kept:
                module._buffers[name] = buffer
                if not _is_expanded(buffer):
                    buffer.copy_(value)


def _is_quantized_weight(buffer: Tensor) -> bool:
    """Return whether it looks like the weights of a layer of AWQ, GPTQ or BitNet, which keep them in buffers."""
    return buffer.ndim > 1 and buffer.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)


def _is_expanded(tensor: Tensor) -> bool:
    """Return whether elements share memory, so that nothing can have written into `tensor`."""
    strides = tensor.stride() if tensor.layout == torch.strided else tensor.shape
    return any(stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=True))


@contextmanager
def side_effects_undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what forward passes within the block do to random generators and to the model's buffers.

    Batch norm's running statistics thus move once an optimizer step, by the pass at the unperturbed weights.
    """
    random_state, buffers = RandomState.capture(devices_of(model, device)), Buffers.capture(model)
    try:
        yield
    finally:
        random_state.restore()
        buffers.restore()


@contextmanager
def counts_undone(trainer: Any) -> Iterator[None]:
    """Undo what losses computed within the block add to the metrics and token counts of a trainer of TRL's."""
    kept = {
        name: deepcopy(vars(trainer)[name]) for name in ("_metrics", "_total_train_tokens") if name in vars(trainer)
    }
    try:
        yield
    finally:
        vars(trainer).update(kept)


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

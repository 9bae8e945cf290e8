"""What a training step changes in the model and the trainer beside gradients, kept so that it can be put back.

Buffers, attributes of modules and of the trainer, and frozen weights that a forward pass moves, such as a momentum
encoder's. Random generators are in `random_state`.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .reachable import CONSTANT, LARGEST_CONTAINER, OF_EVERY_MODULE, counts

Restore = Callable[[], None]

CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)
# Larger tensors that are no buffers are left as they are; a container's elements are looked into where there are few.
LARGEST_TENSOR = 2**22
FEW, DEPTH = 32, 3


class KeptState:
    """The state of some objects at one time.

    Buffers and attributes that hold tensors, NumPy arrays and small containers of them are copied; of other attributes
    it is kept which object they were. Quantized weights in buffers are not copied: they may be most of a model, and are
    only read.

    Args:
        owners: modules, and other objects whose attributes count.
        weights: parameters whose values are kept.
    """

    def __init__(self, owners: Iterable[Any], weights: Iterable[Tensor] = ()) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._contents: list[Restore] = [_tensor_restorer(weight) for weight in weights]
        for owner in owners:
            held, own = vars(owner), _own(owner)
            self._attributes.append((held, own))
            for value in own.values():
                if type(value) not in CONSTANT:
                    self._keep(value, DEPTH)
            if isinstance(owner, nn.Module) and owner._buffers:
                self._attributes.append((owner._buffers, owner._buffers.copy()))
                buffers = (buffer for buffer in owner._buffers.values() if buffer is not None)
                self._contents += [_tensor_restorer(buffer) for buffer in buffers if not _is_quantized_weight(buffer)]

    def restore(self) -> None:
        """Put everything back as it was, whether a pass wrote into an object or put another one in its place."""
        for now, before in self._attributes:
            for name in now.keys() - before.keys() - OF_EVERY_MODULE:
                if counts(name):
                    del now[name]
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    now[name] = value
        for container, elements in self._containers:
            if not _same(container, elements):
                container.clear()
                container.extend(elements) if isinstance(container, list | deque) else container.update(elements)
        with torch.no_grad():
            for restore in self._contents:
                restore()

    def _keep(self, value: Any, depth: int) -> None:
        """Keep the contents of `value`, as far as it can change within."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and value.grad_fn is None and value.numel() <= LARGEST_TENSOR:
                self._contents.append(_tensor_restorer(value))
        elif isinstance(value, np.ndarray) and value.size <= LARGEST_TENSOR:
            self._contents.append(_array_restorer(value))
        elif type(value) in CONTAINERS and len(value) <= LARGEST_CONTAINER:
            self._containers.append((value, value.copy()))
        if depth and isinstance(value, (tuple, *CONTAINERS)) and len(value) <= FEW:
            for element in value.values() if isinstance(value, dict) else value:
                if type(element) not in CONSTANT:
                    self._keep(element, depth - 1)


def _own(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object that training steps may change, by name."""
    held = vars(owner)
    names = held.keys() - OF_EVERY_MODULE
    return {name: held[name] for name in names if isinstance(owner, nn.Module) or counts(name)}


def _tensor_restorer(tensor: Tensor) -> Restore:
    storage, value = tensor.detach(), tensor.detach().clone()  # the same memory, though `tensor.data` is set
    strided = storage.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter)
    inference = storage.is_inference()
    if strided and any(stride == 0 and size > 1 for stride, size in zip(storage.stride(), storage.shape, strict=True)):
        return lambda: None  # elements share memory: nothing can have written into them

    def restore() -> None:
        with torch.inference_mode(inference):  # outside of which such tensors cannot be written into
            if strided and (tensor.data_ptr() != storage.data_ptr() or tensor.shape != storage.shape):
                tensor.data = storage
            storage.copy_(value)

    return restore


def _array_restorer(array: np.ndarray) -> Restore:
    value = array.copy()

    def restore() -> None:
        array[...] = value

    return restore


def _same(container: Any, elements: Any) -> bool:
    try:
        return bool(container == elements)
    except Exception:  # of elements that cannot be compared, such as other tensors than before
        return False


def _is_quantized_weight(tensor: Tensor) -> bool:
    """Return whether it looks like the weights of a layer of AWQ, GPTQ or BitNet, which keep them in buffers."""
    return tensor.ndim > 1 and tensor.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)

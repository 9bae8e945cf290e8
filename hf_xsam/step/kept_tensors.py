"""Copies of tensors, and how they are put back whatever a step has done to their memory."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class KeptTensors:
    """The values of some tensors at one time, and the memory that they were in.

    Args:
        tensors: not sharded; each once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        plain, others = [], []
        for tensor in tensors:
            special = type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided
            if special or tensor.is_inference():
                others.append(tensor)
            elif not _shares_memory_within(tensor):  # else nothing can have written into it
                plain.append(tensor)
        self._plain, self._others = plain, others
        with torch.no_grad():
            self._memory = [tensor.detach() for tensor in plain]  # the same, though `tensor.data` is set
            self._values = [torch.empty_like(tensor) for tensor in self._memory]
            if plain:
                torch._foreach_copy_(self._values, self._memory)  # one call, whose kernels an accelerator fuses
            self._other_values = [tensor.detach().clone() for tensor in others]

    def restore(self) -> None:
        """Put all values back, in the memory that they were in."""
        with torch.no_grad():
            for tensor, memory in zip(self._plain, self._memory, strict=True):
                if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
                    tensor.data = memory
            if self._plain:
                torch._foreach_copy_(self._memory, self._values)
            for tensor, value in zip(self._others, self._other_values, strict=True):
                with torch.inference_mode(
                    tensor.is_inference()
                ):  # outside of which such tensors cannot be written into
                    if tensor.shape != value.shape:
                        tensor.resize_(value.shape)
                    tensor.copy_(value)


def _shares_memory_within(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return 0 in strides and any(s == 0 and size > 1 for s, size in zip(strides, tensor.shape, strict=True))

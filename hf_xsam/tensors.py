"""Dot products and norms over lists of tensors, as if each list were one long vector.

Sums are taken in float32 at least, so that the norm of half-precision gradients neither overflows
nor loses its small terms, and stay on the device: nothing here waits for the accelerator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which `tensor` takes part in sums: float32, or its own where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return <left, right> as a 0-dimensional tensor on the first tensor's device."""
    products = [torch.sum(x.to(wide_dtype(x)) * y) for x, y in zip(left, right, strict=True)]
    return _gather(products).sum()


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm as a 0-dimensional tensor on the first tensor's device."""
    norms = [torch.linalg.vector_norm(x, dtype=wide_dtype(x)) for x in tensors]
    return torch.linalg.vector_norm(_gather(norms))


def scale(factor: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return factor * x for each x, in x's wide dtype and on x's device; `factor` is 0-dimensional."""
    return [x.to(wide_dtype(x)) * factor.to(x.device) for x in tensors]


def add_scaled(tensors: Sequence[Tensor], factor: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Return x + factor * y for each pair; `factor` is 0-dimensional."""
    return [x + factor.to(x.device) * y for x, y in zip(tensors, others, strict=True)]


def reciprocal_or_zero(value: Tensor) -> Tensor:
    """Return 1 / value, or 0 where value is 0: the zero vector has no direction to scale."""
    return torch.where(value == 0, torch.zeros_like(value), 1 / value)


def _gather(scalars: Sequence[Tensor]) -> Tensor:
    # Layers of one model may live on several devices (`device_map`).
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])

"""The top eigenvector of the Hessian by power iteration: where it starts, and what it finds."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .hessian_vector_products import HessianVectorProduct
from .tensors import (
    dot,
    multiply,
    norm,
    reciprocal_or_zero,
    scale,
    set_to_combination,
    shard_like,
    whole_shape,
    wide_dtype,
)


class Eigenpair(NamedTuple):
    """An estimate of the top eigenvector v, its eigenvalue, the spectral shift it was found with, and its residual."""

    vector: list[Tensor]
    value: Tensor
    shift: Tensor
    residual: Tensor

    def is_finite(self) -> Tensor:
        """Return whether every product that it was found with was finite, 0-dimensional."""
        return torch.isfinite(self.value) & torch.isfinite(norm(self.vector))


def random_unit_vector(parameters: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return a random vector shaped like `parameters`, of norm 1, in float32 or wider.

    It draws from generators of its own, so the global random state stays as it is and each process of a
    distributed run gets the same vector, or its part of it.
    """
    generators: dict[torch.device, torch.Generator] = {}
    vector = []
    for parameter in parameters:
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        shape, dtype = whole_shape(parameter), wide_dtype(parameter)
        whole = torch.randn(shape, generator=generators[device], dtype=dtype, device=device)
        vector.append(shard_like(whole, parameter))
    return scale(reciprocal_or_zero(norm(vector)), vector)


def first_vector(gradient: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return what to start the power iteration from where nothing is known: of norm 1, shaped like `gradient`.

    It is the gradient's direction, which leans towards the top eigenvector, and a tenth of a random unit vector, so
    that no part of the weights is left out whose gradient happens to be zero.
    """
    direction = scale(reciprocal_or_zero(norm(gradient)), gradient)
    vector = [x + y / 10 for x, y in zip(direction, random_unit_vector(gradient, seed), strict=True)]
    return scale(1 / norm(vector), vector)


def power_iteration(
    hessian_vector_product: HessianVectorProduct,
    start: Sequence[Tensor],
    iterations: int,
    shift: Tensor | None = None,
    momentum: float = 0.0,
) -> Eigenpair:
    """Return the Hessian's top eigenpair, the algebraically largest, by power iteration from `start`.

    Each iteration sets v to m v + (1 - m) u over its norm, u = (H - s I) v over its norm. Plain power iteration (m = 0,
    s = 0, the paper's) finds the eigenvalue of largest absolute value. Where that is a negative one, the Rayleigh
    quotient nears -norm(H v); past half of that, s becomes -norm(H v), which lifts the negative end of the spectrum to
    about zero and leaves the top eigenvalue the largest. (A random start's quotient is often slightly negative and says
    nothing.) A momentum m averages over iterations, whose H are of different batches in training.

    Args:
        hessian_vector_product: v -> H v, in tensors of its own, which are overwritten.
        start: v to start from, of norm 1.
        iterations: products to spend, at least 1.
        shift: s to start with, 0-dimensional and at most 0, from an earlier estimate; None is 0.
        momentum: m, from 0 to below 1.

    Returns:
        The last v, of norm 1; the Rayleigh quotient lambda = <v, H v> of the v before it, which costs no further
        product; s; and norm(H v - lambda v) / abs(lambda) of the v before it: 0 for an eigenvector, NaN where H v is
        zero. Rounding hides what is below the square root of the dtype's precision, 3e-4 in float32. A product of zero
        leaves v as it is; one that is not finite spoils the pair.
    """
    vector = list(start)
    value = size = norm(vector) * 0
    shift = value if shift is None else shift.to(value)
    for _ in range(iterations):
        product = hessian_vector_product(vector)
        value = dot(vector, product)
        size = norm(product)
        shift = torch.where(value < -size / 2, torch.minimum(shift, -size), shift)
        square = size.square() - 2 * shift * value + shift.square()  # of norm(H v - s v), for norm(v) is 1
        length = square.clamp(min=0).sqrt()  # where v is an eigenvector of s itself, rounding may make it negative
        gain = (1 - momentum) * reciprocal_or_zero(length)
        kept = torch.where(length == 0, torch.ones_like(length), momentum - shift * gain)
        set_to_combination(product, gain, vector, kept)  # in place: a refresh holds two vectors, not four
        multiply(product, 1 / norm(product))
        vector = product
    distance = (size.square() - value.square()).clamp(min=0).sqrt()  # norm(H v - lambda v), for norm(v) is 1
    return Eigenpair(vector, value, shift, distance / value.abs())

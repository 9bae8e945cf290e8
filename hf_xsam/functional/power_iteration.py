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

# How many of the last products `Spectrum` averages over, and the mean cosine below which the spectrum is shifted.
MEMORY = 8
NEGATIVE = -0.25


class Spectrum(NamedTuple):
    """What the products so far tell of the Hessian's two ends, as 0-dimensional tensors.

    In training each product is of another batch, and one batch's quotient is noise around the loss's: what is said of
    the spectrum comes from running means, which are plain means over the first `MEMORY` products.

    Attributes:
        products: how many there were.
        eigenvalue: running mean of the Rayleigh quotient <v, H v>.
        cosine: running mean of <v, H v> / norm(H v).
        size: running mean of norm(H v).
        shift: at most 0. While the mean cosine is below `NEGATIVE`, the eigenvalue of largest absolute value is a
            negative one, and the shift becomes -norm(H v) where that is lower. It goes once the mean quotient is above
            its absolute value, for then the largest eigenvalue dominates without it.
    """

    products: Tensor
    eigenvalue: Tensor
    cosine: Tensor
    size: Tensor
    shift: Tensor

    @classmethod
    def unknown(cls, like: Tensor) -> "Spectrum":
        """Return what is known before the first product, on the device of `like` and of its dtype."""
        zero = like.new_zeros(())
        return cls(zero, zero, zero, zero, zero)

    def after(self, quotient: Tensor, size: Tensor) -> "Spectrum":
        """Return what is known after a product with <v, H v> = `quotient` and norm(H v) = `size`."""
        products = self.products + 1
        weight = 1 / products.clamp(max=MEMORY)
        eigenvalue = self.eigenvalue + weight * (quotient - self.eigenvalue)
        cosine = self.cosine + weight * (quotient * reciprocal_or_zero(size) - self.cosine)
        mean_size = self.size + weight * (size - self.size)
        kept = torch.where(eigenvalue > -self.shift, torch.zeros_like(self.shift), self.shift)
        shift = torch.where(cosine < NEGATIVE, torch.minimum(self.shift, -size), kept)
        return Spectrum(products, eigenvalue, cosine, mean_size, shift)


class Eigenpair(NamedTuple):
    """An estimate of the top eigenvector v, its eigenvalue, what is known of the spectrum, and its residual."""

    vector: list[Tensor]
    value: Tensor
    spectrum: Spectrum
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
    spectrum: Spectrum | None = None,
    momentum: float = 0.0,
) -> Eigenpair:
    """Return the Hessian's top eigenpair, the algebraically largest, by power iteration from `start`.

    Each iteration sets v to m v + (1 - m) u over its norm, u = (H - s I) v over the mean of norm(H v) of the last
    products. A momentum m averages over iterations, whose H are of different batches in training: divided by the mean
    and not by its own norm, each counts as it does in the Hessian of all batches, and where the curvature grows, what
    is new prevails at once.

    Plain power iteration (m = 0, s = 0, the paper's) finds the eigenvalue of largest absolute value. Where that is a
    negative one, v turns into its eigenvector and the Rayleigh quotient nears -norm(H v); s then lifts the negative end
    of the spectrum to about zero and leaves the top eigenvalue the largest: see [`Spectrum`].

    Args:
        hessian_vector_product: v -> H v, in tensors of its own, which are overwritten.
        start: v to start from, of norm 1.
        iterations: products to spend, at least 1.
        spectrum: what earlier products told, with the shift s to start with; None where there were none.
        momentum: m, from 0 to below 1.

    Returns:
        The last v, of norm 1; the Rayleigh quotient lambda = <v, H v> of the v before it, which costs no further
        product; the spectrum; and norm(H v - lambda v) / abs(lambda) of the v before it: 0 for an eigenvector, NaN
        where H v is zero. Rounding hides what is below the square root of the dtype's precision, 3e-4 in float32. A
        product of zero leaves v as it is; one that is not finite spoils the pair.
    """
    vector = list(start)
    value = size = norm(vector) * 0
    spectrum = Spectrum.unknown(value) if spectrum is None else Spectrum(*(known.to(value) for known in spectrum))
    for _ in range(iterations):
        product = hessian_vector_product(vector)
        value = dot(vector, product)
        size = norm(product)
        spectrum = spectrum.after(value, size)
        shift = spectrum.shift
        square = size.square() - 2 * shift * value + shift.square()  # of norm(H v - s v), for norm(v) is 1
        stays = square <= 8 * torch.finfo(square.dtype).eps * size.square()  # an eigenvector of s, but for rounding
        gain = torch.where(stays, 0, (1 - momentum) * reciprocal_or_zero(spectrum.size))
        kept = torch.where(stays, 1, momentum - shift * gain)
        set_to_combination(product, gain, vector, kept)  # in place: a refresh holds two vectors, not four
        multiply(product, 1 / norm(product))
        vector = product
    distance = (size.square() - value.square()).clamp(min=0).sqrt()  # norm(H v - lambda v), for norm(v) is 1
    return Eigenpair(vector, value, spectrum, distance / value.abs())

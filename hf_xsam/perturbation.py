"""SAM's perturbation of the weights, and its exact undoing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .tensors import norm, reciprocal_or_zero, scale


def ascent_perturbation(
    weights: Sequence[Tensor], gradient: Sequence[Tensor], rho: float, adaptive: bool = False
) -> list[Tensor]:
    """Return the perturbation eps that raises the loss most, to first order, within radius rho.

    SAM (Foret et al., arXiv 2010.01412, Eq. 2): eps = rho * g / norm(g).
    ASAM (Kwon et al., arXiv 2102.11600, Eq. 7, p = 2): eps = rho * T^2 g / norm(T g) with T = abs(w).

    Args:
        weights: w, one tensor a parameter.
        gradient: the ascent gradient g, shaped like `weights`; any scale, for only its direction counts.
        rho: radius, in the units of the weights (ASAM: relative to them).
        adaptive: whether to use ASAM's radius.

    Returns:
        eps, shaped like `weights`, in float32 or wider; zero where g is zero.
    """
    if adaptive:
        scaled = [w.abs() * g for w, g in zip(weights, gradient, strict=True)]
        direction = [w.abs() * g for w, g in zip(weights, scaled, strict=True)]
        length = norm(scaled)
    else:
        direction, length = list(gradient), norm(gradient)
    return scale(rho * reciprocal_or_zero(length), direction)


@contextmanager
def perturbed(weights: Sequence[Tensor], perturbation: Sequence[Tensor]) -> Iterator[None]:
    """Hold `weights` at w + perturbation within the block, and at w, bit for bit, after it.

    The weights are copied back: subtracting the perturbation would leave a rounding error in them (in
    bfloat16, most of it). They are put back as well when the block is left by an exception.
    """
    backup = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, shift in zip(weights, perturbation, strict=True):
                weight.add_(shift)
        del perturbation
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, backup, strict=True):
                weight.copy_(original)

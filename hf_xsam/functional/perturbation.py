"""SAM's perturbation of the weights, and its exact undoing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .tensors import is_sharded, local, norm, reciprocal_or_zero, scale, wide_dtype

# Where weights are rounded, perturbations are scaled by 2**-1 to 2**16; 12 halvings find the factor within 0.3%.
EXPONENTS = (-1.0, 16.0)
HALVINGS = 12


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
        eps, shaped like `weights`, in float32 or wider; zero where g is zero, and not finite where g is not.
    """
    if adaptive:
        scaled = [w.abs() * g for w, g in zip(weights, gradient, strict=True)]
        direction = [w.abs() * g for w, g in zip(weights, scaled, strict=True)]
        length = norm(scaled)
    else:
        direction, length = list(gradient), norm(gradient)
    return scale(rho * reciprocal_or_zero(length), direction)


@contextmanager
def perturbed(weights: Sequence[Tensor], perturbation: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Hold `weights` at w + perturbation within the block, and at w, bit for bit, after it.

    The weights are copied back: subtracting the perturbation would leave a rounding error in them (in
    bfloat16, most of it). They are put back as well when the block is left by an exception, and when the block has
    given a weight other memory (`weight.data = ...`).

    Weights in half precision round much of a small perturbation away. It is then enlarged until they move by its
    norm, see [`representable`].

    Yields:
        The realised norm over the perturbation's, 0-dimensional, or None where no weight is in half precision.
    """
    realised = None
    if any(weight.dtype != wide_dtype(weight) for weight in weights):
        perturbation, realised = representable(weights, perturbation)
    held = [local(weight) for weight in weights]
    backup = torch._foreach_mul(held, 1.0)  # copies, in one call
    try:
        torch._foreach_add_(held, [local(shift) for shift in perturbation])
        del perturbation
        yield realised
    finally:
        # One call, which a second Ctrl-C cannot cut in two.
        torch._foreach_copy_(held, backup)
        for weight, storage in zip(weights, held, strict=True):
            if not is_sharded(weight) and weight.data_ptr() != storage.data_ptr():
                weight.data = storage


def representable(weights: Sequence[Tensor], perturbation: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return c * perturbation, with the c for which adding it moves the rounded weights by norm(perturbation).

    Rounding w + eps to bfloat16 keeps a coordinate of eps only where it exceeds half a step between neighbouring
    numbers at w. How far the weights move, norm(round(w + c * eps) - w), does not fall with c: bisection on log2(c).

    Args:
        weights: w, in any dtypes.
        perturbation: eps, shaped like `weights`, in float32 or wider.

    Returns:
        c * eps, and the realised norm over the asked one, norm(round(w + c * eps) - w) / norm(eps), 0-dimensional:
        about 1, or less where even the largest c moves too little; 0 where eps is zero.
    """

    def moved_by(factor: Tensor) -> Tensor:
        moves = (
            (w.to(wide_dtype(w)) + factor.to(w.device) * x).to(w.dtype).to(wide_dtype(w)) - w
            for w, x in zip(weights, perturbation, strict=True)
        )
        return norm(moves)

    asked = norm(perturbation)
    low, high = (torch.full_like(asked, exponent) for exponent in EXPONENTS)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_far = moved_by(2**middle) > asked
        low, high = torch.where(too_far, low, middle), torch.where(too_far, middle, high)
    short, far = moved_by(2**low), moved_by(2**high)
    nearer = asked - short < far - asked
    factor, realised = 2 ** torch.where(nearer, low, high), torch.where(nearer, short, far)
    return scale(factor, perturbation), realised * reciprocal_or_zero(asked)

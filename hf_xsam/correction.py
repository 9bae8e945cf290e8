"""X-SAM's correction of the perturbed gradient along the Hessian's top eigenvector."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .tensors import add_scaled, dot, norm, reciprocal_or_zero, scale

Correction = Literal["paper", "projection", "aligned"]


def corrected_gradient(
    gradient: Sequence[Tensor],
    eigenvector: Sequence[Tensor],
    alpha: float,
    correction: Correction = "paper",
    normalize: bool = True,
) -> list[Tensor]:
    """Return the descent gradient d, the perturbed gradient a with its part along v changed.

    - "paper" (X-SAM, arXiv 2601.10251, Eq. 11): d = u - alpha * abs(<u, v>) * v. It depends on the
      sign of v, which the Hessian leaves open and the warm start alone fixes.
    - "projection" (Theorem 5.1): d = u - alpha * <u, v> * v damps the part along v.
    - "aligned": d = u + alpha * <u, v> * v amplifies it: a longer step along the direction of largest curvature.
      Whether the top eigenvalue falls under it depends on the task, see `experiments/README.md`.

    u is a / norm(a) when `normalize`, else a.

    Args:
        gradient: a, the loss gradient at w + eps, one tensor a parameter.
        eigenvector: v, shaped like `gradient`, of norm 1 over all parameters.
        alpha: strength of the correction; 0 leaves u.
        correction: which formula.
        normalize: whether d starts from a of norm 1 (the paper) or keeps the norm of a.

    Returns:
        d, shaped like `gradient`, in float32 or wider.
    """
    length, along = norm(gradient), dot(gradient, eigenvector)
    size, change = correction_factors(length, along, alpha, correction, normalize)
    return add_scaled(scale(size, gradient), change, eigenvector)


def correction_factors(
    length: Tensor, along: Tensor, alpha: float, correction: Correction = "paper", normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Return s and c, 0-dimensional, with d = s * a + c * v: see [`corrected_gradient`].

    Args:
        length: norm(a), 0-dimensional.
        along: <a, v>, 0-dimensional.
        alpha: strength of the correction.
        correction: which formula.
        normalize: whether d starts from a of norm 1.
    """
    size = reciprocal_or_zero(length) if normalize else torch.ones_like(length)
    along = size * along
    change = {"paper": -along.abs(), "projection": -along, "aligned": along}[correction]
    return size, alpha * change

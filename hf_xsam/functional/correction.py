"""X-SAM's correction of the perturbed gradient along the Hessian's top eigenvector."""

from typing import Literal

import torch
from torch import Tensor

from .tensors import reciprocal_or_zero

Correction = Literal["paper", "projection", "aligned"]


def correction_factors(
    length: Tensor, along: Tensor, alpha: float, correction: Correction = "paper", normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Return s and c with d = s * a + c * v, d the descent gradient: a, the gradient at w + eps, changed along v.

    - "paper" (X-SAM, arXiv 2601.10251, Eq. 11): d = u - alpha * abs(<u, v>) * v. It depends on the
      sign of v, which the Hessian leaves open and the warm start alone fixes.
    - "projection" (Theorem 5.1): d = u - alpha * <u, v> * v damps the part along v.
    - "aligned": d = u + alpha * <u, v> * v amplifies it: a longer step along the direction of largest curvature.
      Whether the top eigenvalue falls under it depends on the task, see `experiments/README.md`.

    u is a / norm(a) when `normalize`, else a.

    Args:
        length: norm(a), 0-dimensional.
        along: <a, v>, 0-dimensional, v the top eigenvector, of norm 1 over all parameters.
        alpha: strength of the correction; 0 leaves u.
        correction: which formula.
        normalize: whether d starts from a of norm 1 (the paper) or keeps the norm of a.

    Returns:
        s and c, 0-dimensional.
    """
    size = reciprocal_or_zero(length) if normalize else torch.ones_like(length)
    along = size * along
    change = {"paper": -along.abs(), "projection": -along, "aligned": along}[correction]
    return size, alpha * change

"""What a symmetric matrix is like, from its products with vectors: its top eigenpairs by Lanczos, and its trace."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .hessian_vector_products import HessianVectorProduct
from .tensors import add_scaled, dot, wide_dtype

# Vectors that Lanczos holds beyond two an eigenvector, and so products that it spends before it looks whether it is
# done. Of 2, 3, 4 and 8, 2 took more restarts for several eigenvectors, and 8 more products where few suffice.
SPARE_VECTORS = 4
MAX_RESTARTS = 100


@dataclass
class Trace:
    """An estimate of a trace, the standard error of it, and from how many random vectors."""

    mean: float
    standard_error: float
    samples: int


def top_eigenpairs(
    product: HessianVectorProduct, start: Sequence[Tensor], count: int, tolerance: float
) -> tuple[list[float], list[list[Tensor]]]:
    """Return the `count` algebraically largest eigenvalues, the largest first, and their eigenvectors, each of norm 1.

    By ARPACK's implicitly restarted Lanczos method (`scipy.sparse.linalg.eigsh`), in float32, or float64 where a tensor
    of `start` is; it holds 2 * count + 4 vectors in main memory.

    Args:
        product: v -> H v.
        start: not zero, and not orthogonal to the eigenvectors; the nearer to them, the fewer products it takes.
        count: eigenpairs to find, at least 1.
        tolerance: of the residual, norm(H v - lambda v) <= tolerance * abs(lambda). The eigenvalue's error is smaller.

    Raises:
        ImportError: without scipy.
        ValueError: where H has not more than `count` rows.
        ArithmeticError: where a product is not finite, or ARPACK finds no such pairs.
    """
    try:
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
    except ImportError as error:
        raise ImportError("Eigenvalues are found by scipy: pip install 'hf_xsam[tools]'") from error

    size = sum(tensor.numel() for tensor in start)
    if count >= size:
        raise ValueError(f"top_k is {count}; the Hessian has {size} rows, so it must be below that.")
    dtype = np.float64 if any(wide_dtype(tensor) == torch.float64 for tensor in start) else np.float32

    def flat(vector: Sequence[Tensor]) -> np.ndarray:
        return np.concatenate([x.detach().cpu().numpy().ravel().astype(dtype, copy=False) for x in vector])

    def shaped(flat: np.ndarray) -> list[Tensor]:
        parts = torch.as_tensor(flat).split([tensor.numel() for tensor in start])
        return [part.view(x.shape).to(x.device, wide_dtype(x)) for part, x in zip(parts, start, strict=True)]

    def matvec(vector: np.ndarray) -> np.ndarray:
        result = flat(product(shaped(vector.ravel())))
        if not np.isfinite(result).all():
            raise ArithmeticError(
                "A Hessian-vector product is not finite: the loss overflows, or its derivatives do. "
                "Measure in float32, or on other data."
            )
        return result

    operator = LinearOperator((size, size), matvec=matvec, dtype=dtype)
    settings: dict[str, Any] = {"ncv": min(size, 2 * count + SPARE_VECTORS), "maxiter": MAX_RESTARTS, "tol": tolerance}
    try:
        values, vectors = eigsh(operator, k=count, which="LA", v0=flat(start), **settings)
    except ArpackError as error:  # ArpackNoConvergence is one
        raise ArithmeticError(
            f"ARPACK found no top eigenpairs ({error}). Raise tolerance (it is {tolerance}), or use exact products "
            "in place of finite differences; where the loss is linear in all of eigen_scope, there are none to find."
        ) from error
    order = np.argsort(values)[::-1]
    return [float(values[i]) for i in order], [shaped(vectors[:, i].copy()) for i in order]


def hutchinson_trace(
    product: HessianVectorProduct,
    like: Sequence[Tensor],
    samples: int,
    seed: int,
    eigenvalues: Sequence[float] = (),
    eigenvectors: Sequence[Sequence[Tensor]] = (),
) -> Trace:
    """Return Hutchinson's estimate of the trace of H, with the eigenpairs that are known taken out of it.

    With V the known eigenvectors and P = I - V V^T, the trace is the sum of their eigenvalues and of tr(P H P), which
    is the mean of <P z, H P z> over random vectors z of signs. Without any known, <z, H z> has a variance of 2 * (the
    sum of H_ij^2 for i != j), so that a diagonal H's trace is exact; where a few eigenvalues are large, most of the
    variance is theirs.

    Args:
        product: v -> H v.
        like: tensors of the shapes and on the devices of v.
        samples: random vectors, at least 2, for without a second there is no standard error.
        seed: of their generator, which is on the CPU: the vectors are the same whatever the device.
        eigenvalues: those known.
        eigenvectors: theirs, each of norm 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(tensor: Tensor) -> Tensor:
        bits = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int8)
        return bits.to(tensor.device, wide_dtype(tensor)) * 2 - 1

    values = []
    for _ in range(samples):
        vector = [signs(tensor) for tensor in like]
        for eigenvector in eigenvectors:
            vector = add_scaled(vector, -dot(eigenvector, vector), eigenvector)
        values.append(dot(vector, product(vector)).item())
    mean = math.fsum(eigenvalues) + statistics.fmean(values)
    return Trace(mean, statistics.stdev(values) / math.sqrt(samples), samples)

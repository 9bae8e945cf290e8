"""What several processes have to agree on: means of their tensors, and which way to go."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's


def holds_everywhere(accelerator: Accelerator, condition: Tensor | bool) -> bool:
    """Return whether `condition`, 0-dimensional, holds on every process: they have to go the same way."""
    if accelerator.num_processes > 1:
        condition = torch.as_tensor(condition, dtype=torch.float32, device=accelerator.device)
        return bool(accelerator.reduce(condition, reduction="mean") == 1)
    return bool(condition)


def all_finite(accelerator: Accelerator, values: Iterable[Tensor]) -> bool:
    """Return whether all 0-dimensional `values` are finite, on every process."""
    finite = torch.isfinite(torch.stack([value.to(accelerator.device) for value in values])).all()
    return holds_everywhere(accelerator, finite)


def mean_over_processes(accelerator: Accelerator, tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean over the processes of each of `tensors`, which are overwritten.

    They travel as DDP's gradients do, in buckets of about 25 MiB: the fewer all-reduces, the fewer latencies, and no
    second copy of them all. `accelerator.reduce` alone makes one all-reduce a tensor.

    Args:
        accelerator: the trainer's.
        tensors: shaped alike on every process.
    """
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        parts = accelerator.reduce(flat, reduction="mean").split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    return tensors


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbours of one dtype and device together, a bucket of at least `BUCKET_BYTES` each but for the last."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        of_another_kind = bucket and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if size >= BUCKET_BYTES or of_another_kind:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket

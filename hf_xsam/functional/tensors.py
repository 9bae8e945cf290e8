"""Dot products and norms over lists of tensors, as if each list were one long vector.

A tensor may be sharded over processes (a `DTensor` under FSDP2, a [`Part`] under DeepSpeed): the results are those of
the whole tensor, for one all-reduce of a scalar, and the same on every process. Sums are taken in float32 at least, so
that the norm of half-precision gradients neither overflows nor loses its small terms, and stay on the device: nothing
here waits for the accelerator. Norms and factors are calls for many tensors, whose kernels an accelerator fuses.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a part is: from index `start` on of a tensor of this shape, flattened."""

    shape: torch.Size
    start: int


class Part(Tensor):
    """Neighbouring elements of a tensor, the others of which other processes hold; one-dimensional, and may be empty.

    What is computed from parts are parts. Only those that `of` makes know their place.
    """

    place: Place
    grad: Tensor | None = None  # any tensor, where torch would ask for the dtype of the weights

    @classmethod
    def of(cls, piece: Tensor, place: Place) -> "Part":
        """Return `piece`, sharing its memory, as the part at this place."""
        part = local(piece).as_subclass(cls)
        part.place = place
        return part


SHARDED: tuple[type[Tensor], ...] = (Part,)
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    SHARDED = (DTensor, Part)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds a part of `tensor` only."""
    return isinstance(tensor, SHARDED)


def _is_distributed(tensor: Tensor) -> "TypeGuard[DTensor]":
    return is_sharded(tensor) and not isinstance(tensor, Part)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, sharing its memory: a plain tensor, outside of any graph.

    Complex numbers are two real ones, in a last dimension: X-SAM's vectors are over the real numbers.
    """
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if isinstance(tensor, Part):
        with torch._C.DisableTorchFunctionSubclass():  # else it would be a part again
            return tensor.as_subclass(Tensor)
    tensor = tensor.to_local() if _is_distributed(tensor) else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor, of which this process may hold a part."""
    return tensor.place.shape if isinstance(tensor, Part) else tensor.shape


def offsets(tensor: Tensor) -> list[int]:
    """Return where in the whole tensor this process's part begins: in each dimension, or in the flattened one."""
    if isinstance(tensor, Part):
        return [tensor.place.start]
    return list(tensor.__create_chunk_list__()[0].offsets) if _is_distributed(tensor) else [0] * tensor.dim()


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return `whole`, which every process has, on the parameter's device and sharded as it is."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, Part):
        return Part.of(whole.flatten().narrow(0, parameter.place.start, len(parameter)).clone(), parameter.place)
    return (
        distribute_tensor(whole, parameter.device_mesh, parameter.placements) if _is_distributed(parameter) else whole
    )


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which `tensor` takes part in sums: float32, or its own where that is wider."""
    return _promoted(tensor.dtype, torch.float32)


@cache
def _promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return torch.promote_types(one, other)  # an operation to torch's dispatcher, which costs as much as one


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return <left, right> as a 0-dimensional tensor on the first tensor's device."""
    return _total((x, _dot(local(x), local(y))) for x, y in zip(left, right, strict=True))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm as a 0-dimensional tensor on the first tensor's device."""
    iterator = iter(tensors)

    def squares() -> Iterator[tuple[Tensor, Tensor]]:
        # In groups: `tensors` may be computed as they are asked for, to hold few at a time.
        while group := list(islice(iterator, 32)):
            held = [local(x) for x in group]
            dtype = reduce(_promoted, map(wide_dtype, held))
            norms = torch._foreach_norm(held, dtype=dtype)
            yield from zip(group, torch._foreach_mul(norms, norms), strict=True)

    return _total(squares()).sqrt()


def scale(factor: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return factor * x for each x, in x's wide dtype and on x's device; `factor` is 0-dimensional."""
    if tensors and all(x.device == factor.device and x.dtype == wide_dtype(x) and not is_sharded(x) for x in tensors):
        return list(torch._foreach_mul(list(tensors), factor))
    return [x.to(wide_dtype(x)) * factor.to(x.device) for x in tensors]


def multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply each x by `factor`, 0-dimensional, in place."""
    by_device = defaultdict(list)
    for x in map(local, tensors):
        by_device[x.device].append(x)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))


def add_scaled(tensors: Sequence[Tensor], factor: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Return x + factor * y for each pair; `factor` is 0-dimensional."""
    return [x + factor.to(x.device) * y for x, y in zip(tensors, others, strict=True)]


def set_to_combination(tensors: Sequence[Tensor], a: Tensor, others: Sequence[Tensor], b: Tensor) -> None:
    """Set each x to a * x + b * y, without a copy of x where x is in its wide dtype; `a` and `b` are 0-dimensional."""
    in_place = defaultdict(list)
    for x, y in zip(map(local, tensors), map(local, others), strict=True):
        if x.dtype == wide_dtype(x):
            in_place[x.device].append((x, y))
        else:
            x.copy_(a.to(x.device) * x.to(wide_dtype(x)) + b.to(x.device) * y)
    for device, pairs in in_place.items():
        xs, ys = zip(*pairs, strict=True)
        torch._foreach_mul_(xs, a.to(device))
        torch._foreach_addcmul_(xs, ys, [b.to(device)] * len(pairs))


def reciprocal_or_zero(value: Tensor) -> Tensor:
    """Return 1 / value, or 0 where value is 0: the zero vector has no direction to scale."""
    return torch.where(value == 0, torch.zeros_like(value), 1 / value)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    dtype = _promoted(wide_dtype(x), y.dtype)
    if y.ndim == 0:  # broadcast
        return x.sum(dtype=dtype) * y
    return torch.linalg.vecdot(x.flatten().to(dtype), y.flatten().to(dtype))


def _total(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum pairs of a tensor and what this process's part of it adds, over the pairs and the processes; 0 of none."""
    parts: dict[Hashable, list[Tensor]] = defaultdict(list)
    device = None
    for tensor, term in terms:
        device = device or term.device  # layers of one model may live on several (`device_map`)
        parts[_layout(tensor)].append(term.to(device))
    totals = [_over_processes(layout, torch.stack(part).sum()) for layout, part in parts.items()]
    return torch.stack(totals).sum() if totals else torch.zeros(())


def _layout(tensor: Tensor) -> Hashable:
    """Return over which processes a tensor is spread: None if every process has it all."""
    if isinstance(tensor, Part):
        return Part
    return (tensor.device_mesh, tuple(p.is_shard() for p in tensor.placements)) if _is_distributed(tensor) else None


def _over_processes(layout: Any, partial: Tensor) -> Tensor:
    if layout is None:
        return partial
    if layout is Part:
        torch.distributed.all_reduce(partial)
        return partial
    mesh, sharded = layout
    placements = [Partial() if dimension else Replicate() for dimension in sharded]
    return DTensor.from_local(partial, mesh, placements, run_check=False).full_tensor()

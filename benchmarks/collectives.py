"""Counts what processes say to each other: collectives, and the bytes of the tensors in them."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Traffic:
    """Collectives of one kind, and the bytes of their whole tensors."""

    count: int = 0
    bytes: int = 0


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives within its block, by kind and by whether floating-point tensors or something else travels.

    DDP's own, which its C++ code starts, and FSDP2's are among them. A collective of up to `SMALL` numbers costs its
    latency only and counts as "small". Those of integers ("other") are DDP's map of unused parameters.
    """

    SMALL = 64

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        for kind in ("allreduce", "allgather", "reduce_scatter", "broadcast"):
            if name.startswith("c10d::") and kind in name:
                self._add(kind, args)
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, args: Any) -> None:
        leaves = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        # Gathering and scattering name an input and an output, of which one is the whole.
        size = sum(x.nbytes for x in leaves) if kind in ("allreduce", "broadcast") else max(x.nbytes for x in leaves)
        small = sum(x.numel() for x in leaves) <= self.SMALL
        whole = "small" if small else kind if leaves[0].is_floating_point() else "other"
        self.traffic[whole].count += 1
        self.traffic[whole].bytes += size

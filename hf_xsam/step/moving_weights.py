"""Weights that training steps move beside the optimizer: a momentum encoder's, or those that forward normalizes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..functional.tensors import is_sharded, local

# Over how many steps weights are compared with what they were; later ones show by their version or memory.
WATCHED_STEPS = 3
# Weights of fewer bytes are all taken to move: to copy them is as quick as to compare them.
FEW_BYTES = 2**24


class MovingWeights:
    """Those of some weights that training steps move.

    Args:
        weights: parameters; sharded ones are left out, and those of ZeRO-3, which come and go.

    Attributes:
        weights: the others, each once.
        moving: those found so far.
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        here = (weight for weight in weights if not is_sharded(weight) and not hasattr(weight, "ds_tensor"))
        self.weights = list({id(weight): weight for weight in here}.values())
        self.moving: list[Tensor] = []
        self.steps = 0
        self._marks, self._sums = self._read_marks(), torch.zeros(0)

    def begin_step(self) -> None:
        """Begin to watch a step."""
        self.steps += 1
        self._marks = self._read_marks()
        if self.is_watched:
            self._sums = sums(self.weights)

    def note_moved(self) -> None:
        """Find out which weights have moved since the step began."""
        moved = {
            i for i, (now, before) in enumerate(zip(self._read_marks(), self._marks, strict=True)) if now != before
        }
        if self.steps and self.is_watched:
            moved |= set(changed(self._sums, sums(self.weights)))
        known = set(map(id, self.moving))
        self.moving = self.moving + [
            w for w in (self.weights[number] for number in sorted(moved)) if id(w) not in known
        ]

    @property
    def is_watched(self) -> bool:
        """Return whether this step is one of those in which any movement is seen."""
        return self.steps <= WATCHED_STEPS

    def _read_marks(self) -> list[int]:
        # Perturbations come and go in place.
        return [weight.data_ptr() for weight in self.weights]


class FrozenWeights(MovingWeights):
    """The weights that take no gradient, and those of them that training steps move.

    Args:
        weights: frozen ones.
        trainable_bytes: how large the others are.
    """

    def __init__(self, weights: Iterable[nn.Parameter], trainable_bytes: int) -> None:
        super().__init__(weights)
        size = sum(weight.nbytes for weight in self.weights)
        self._all_move = size <= FEW_BYTES
        # A copy of all of them is taken while they are watched, if it is no larger than a momentum encoder.
        self._few = size <= 2 * trainable_bytes

    def candidates(self) -> list[Tensor]:
        """Return the weights whose values the passes to come may change."""
        return list(self.weights) if self._all_move or (self._few and self.is_watched) else self.moving

    def begin_step(self) -> None:
        """Begin to watch a step."""
        if not self._all_move:
            super().begin_step()

    def note_moved(self) -> None:
        """Find out which weights have moved since the step began."""
        if not self._all_move:
            super().note_moved()

    def _read_marks(self) -> list[int]:
        return [hash((weight._version, weight.data_ptr())) for weight in self.weights]


def sums(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of each tensor and, of floating-point ones, their norm, by which changes show; on the CPU."""
    totals = [_sum_and_norm(tensor) for tensor in map(local, tensors)]
    device = totals[0].device if totals else None
    return torch.stack([total.to(device) for total in totals]).cpu().double() if totals else torch.zeros(0)


def changed(before: Tensor, after: Tensor) -> list[int]:
    """Return the numbers of the tensors whose `sums` differ; NaN twice is no change."""
    return ((after != before) & ~(after.isnan() & before.isnan())).nonzero().flatten().tolist()


def _sum_and_norm(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_mps else torch.float64
    total = tensor.sum(dtype=dtype)
    # A movement along which the sum stays is not rare: a classifier's biases.
    if tensor.is_floating_point() and tensor.layout == torch.strided:
        total = total + torch.linalg.vector_norm(tensor, dtype=dtype)
    return total

"""The mean loss of a model over data, as a function of its weights: its value, derivatives, and slices."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..data import IGNORED
from ..functional.perturbation import ascent_perturbation, perturbed
from ..functional.tensors import dot, norm, scale
from ..step.curvature import Curvature
from ..step.logs import alignment
from ..step.loss import mean_loss
from ..step.precision import loss_scale

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass
class Slice:
    """The loss at w + distance * direction, the direction of norm 1, for each distance."""

    distances: list[float]
    losses: list[float]


class Landscape:
    """L(w), the mean loss over batches, at the weights as they stand whenever it is asked for.

    Args:
        accelerator: whose mixed precision the loss is computed in.
        model: without wrappers, in the mode that it is to be measured in. Gradients come and go in its `.grad`.
        data: batches, read once and kept where they are; each is on the model's device while it is used. They count by
            their targets.
        compute_loss: the mean loss of a batch, called as compute_loss(model, batch).
        parameters: w; what derivatives are taken with respect to.

    Raises:
        ValueError: where no batch has a target.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        data: Iterable[Any],
        compute_loss: LossFunction,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        def loss_on(batch: Any) -> Tensor:
            return compute_loss(model, send_to_device(batch, parameters[0].device))

        counted = [(batch, count) for batch in data if (count := targets_in(batch, model))]
        if not counted:
            raise ValueError("dataloader has no batches, or none with a label.")
        self.batches, self.targets = len(counted), sum(count for _, count in counted)
        self._accelerator, self._model, self._parameters = accelerator, model, parameters
        losses = [partial(loss_on, batch) for batch, _ in counted]
        self._loss = mean_loss(accelerator, model, losses, sharded=False, weights=[count for _, count in counted])
        self._unscale = 1 / loss_scale(accelerator)

    def loss(self) -> float:
        """Return L(w)."""
        with torch.no_grad():
            return math.fsum(term.item() for term in self._loss.terms()) * self._unscale.item()

    def gradient(self) -> list[Tensor]:
        """Return grad L(w), one tensor a parameter, in float32 or wider."""
        return scale(self._unscale, self._loss.gradient(self._parameters))

    def curvature(self, hvp: str) -> Curvature:
        """Return the curvature of L, whose Hessian-vector products are computed as `hvp` says."""
        return Curvature(self._accelerator, self._model, self._parameters, self._loss, hvp)

    def slice_along(self, direction: Sequence[Tensor], distances: Sequence[float]) -> Slice:
        """Return L(w + t * direction) for each distance t; the weights are put back exactly."""
        losses = []
        for distance in distances:
            with perturbed(self._parameters, [distance * x for x in direction]):
                losses.append(self.loss())
        return Slice([float(distance) for distance in distances], losses)

    def perturbed_loss(self, gradient: Sequence[Tensor], rho: float) -> float:
        """Return L(w + rho * g / norm(g)) for the gradient g; the weights are put back exactly."""
        with perturbed(self._parameters, ascent_perturbation(self._parameters, gradient, rho)):
            return self.loss()


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a transformers model computes itself.

    Raises:
        ValueError: where it computes none.
    """
    if "labels" not in batch or (loss := model(**batch).get("loss")) is None:
        raise ValueError("The model returns no loss: its batches need `labels`. For another loss, pass compute_loss.")
    return loss


def targets_in(batch: Any, model: nn.Module) -> int:
    """Return over how many targets the loss of `batch` is a mean: tokens that have a label, or examples.

    Raises:
        ValueError: where no tensor shows how many there are.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        base = getattr(model, "get_base_model", lambda: model)()  # of PEFT's adapters
        predicts_the_next = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        labels = labels[..., 1:] if predicts_the_next and labels.ndim > 1 else labels
        return int((labels != IGNORED).sum())
    parts = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    sizes = [len(part) for part in parts if isinstance(part, Tensor) and part.ndim > 0]
    if not sizes:
        raise ValueError(
            "dataloader yields a batch without a tensor; a batch must be a tensor, or a sequence or mapping that has "
            "one, with one row for each example."
        )
    return sizes[0]


def angle_degrees(gradient: Sequence[Tensor], eigenvector: Sequence[Tensor]) -> float:
    """Return the angle between the gradient and the line of the eigenvector, which has no sign: 0 to 90 degrees."""
    angle = alignment(dot(gradient, eigenvector), norm(gradient))["angle_degrees"].item()
    return min(angle, 180 - angle)


def uphill(eigenvector: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
    """Return v or -v, the one along which the loss rises."""
    return [-x for x in eigenvector] if dot(gradient, eigenvector) < 0 else list(eigenvector)


@contextmanager
def plain_accelerator(model: nn.Module) -> Iterator[Accelerator]:
    """Yield an Accelerator without mixed precision, and leave the states that all Accelerators share as they were."""
    kinds = (PartialState, AcceleratorState, GradientState)
    shared = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        yield Accelerator(cpu=on_cpu, mixed_precision="no")
    finally:
        for kind, state in zip(kinds, shared, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)

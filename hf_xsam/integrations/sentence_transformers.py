"""X-SAM in sentence-transformers' trainer: `XSAMSentenceTransformerTrainer`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import nn

from ..step.replay import MicroBatch, StepAgain, Window
from ..step.sharpness_aware import SharpnessAwareSteps
from ..trainer import XSAMTrainerMixin


class XSAMSentenceTransformerTrainer(XSAMTrainerMixin, SentenceTransformerTrainer):
    """[`~sentence_transformers.SentenceTransformerTrainer`] with X-SAM: takes `xsam_config` beside its arguments.

    Losses that cache gradients (`CachedMultipleNegativesRankingLoss`, ...) run their backward pass in a hook, so their
    Hessian-vector products are finite differences.

    Parameters of the loss's own, such as `SoftmaxLoss`'s classifier, are perturbed and corrected with the model's. In
    the scopes their names are those in the loss, where the model's begin with `model.`: to leave the loss's alone, set
    `perturb_scope` and `eigen_scope` to `"^model\\\\."`.

    Raises:
        ValueError: for several processes where the loss has such parameters, for sentence-transformers does not
            average their gradients.
    """

    rows_are_examples = False  # losses compare the rows of a batch with each other

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        loss = self._loss_with_parameters()
        if loss is not None and self.args.world_size > 1:
            raise ValueError(
                f"{type(loss).__name__} has trainable parameters of its own, whose gradients sentence-transformers "
                f"does not average over the {self.args.world_size} processes. Train in one process, or freeze them "
                "with requires_grad_(False)."
            )

    def _get_collator_with_removed_columns(self, data_collator: Any, *args: Any, **kwargs: Any) -> Any:
        return data_collator  # as in sentence-transformers' data loaders: the collator chooses among the columns

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the stock loss, of the model given: second derivatives take it without its wrappers."""
        unwrapped = model is not self.model_wrapped and torch.is_grad_enabled()
        with self._loss_of(model) if unwrapped else nullcontext():
            return super().compute_loss(model, *args, **kwargs)

    @contextmanager
    def _loss_of(self, model: nn.Module) -> Iterator[None]:
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        holders = [part for loss in losses for part in loss.modules() if hasattr(part, "model")]
        held = [(holder, holder.model) for holder in holders if holder.model is self.model_wrapped]
        try:
            for holder, _ in held:
                holder.model = model
            yield
        finally:
            for holder, wrapped in held:
                holder.model = wrapped

    def _loss_with_parameters(self) -> nn.Module | None:
        """Return the loss if it has trainable parameters that are not the model's."""
        if not isinstance(self.loss, nn.Module):  # one of several, or not built yet
            return None
        known = {id(parameter) for parameter in self.model.parameters()}
        own = any(p.requires_grad and id(p) not in known for p in self.loss.parameters())
        return self.loss if own else None

    def _unwrapped_model(self) -> nn.Module:
        return self._loss_with_parameters() or super()._unwrapped_model()

    def _begin_steps(self, kind: type[SharpnessAwareSteps] = SharpnessAwareSteps) -> SharpnessAwareSteps:
        return super()._begin_steps(kind if self._loss_with_parameters() is None else _StepsOfLoss)


class _StepsOfLoss(SharpnessAwareSteps):
    """Steps whose model is the loss, which holds the model: gradients are cleared and set aside in both."""

    def begin_window(self, model: nn.Module, training_step: StepAgain, trainer: Any, step: int) -> Window:
        def step_again(_: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
            return training_step(model, micro_batch)

        return super().begin_window(self.model, step_again, trainer, step)

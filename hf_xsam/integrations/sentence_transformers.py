"""X-SAM in sentence-transformers' trainers, of embedders, rerankers and sparse encoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainer
from sentence_transformers.sparse_encoder import SparseEncoderTrainer
from torch import nn

from ..step.replay import MicroBatch, StepAgain, Window
from ..step.sharpness_aware import SharpnessAwareSteps
from ..trainer import XSAMTrainerMixin


class _LossesHoldModelMixin(XSAMTrainerMixin):
    """X-SAM where the loss is a module that holds the model, and may have parameters of its own."""

    loss: Any  # the trainer's: a loss, or losses by data set
    rows_are_examples = False  # losses compare the rows of a batch with each other

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._freeze_guides()
        if self._parameters_of_losses() and self.args.world_size > 1:
            raise ValueError(
                "The loss has trainable parameters of its own, whose gradients sentence-transformers does not average "
                f"over the {self.args.world_size} processes. Train in one process, or freeze them with "
                "requires_grad_(False)."
            )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a fresh model and its losses."""
        model = super().call_model_init(trial)
        self._freeze_guides()
        return model

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the stock loss; of the model given, which is without wrappers where it is differentiated twice."""
        if not torch.is_grad_enabled():
            return super().compute_loss(model, *args, **kwargs)
        with self._losses_of(model), self._losses_frozen_to_measure():
            return super().compute_loss(model, *args, **kwargs)

    @contextmanager
    def _losses_of(self, model: nn.Module) -> Iterator[None]:
        parts = [part for loss in self._losses() for part in loss.modules()]
        holders = [part for part in parts if getattr(part, "model", None) is self.model_wrapped is not model]
        try:
            for holder in holders:
                holder.model = model
            yield
        finally:
            for holder in holders:
                holder.model = self.model_wrapped

    @contextmanager
    def _losses_frozen_to_measure(self) -> Iterator[None]:
        # In evaluation mode, for nobody would clear the gradients that a measurement leaves in them.
        frozen = [] if super()._unwrapped_model().training else self._parameters_of_losses()
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _losses(self) -> list[nn.Module]:
        loss = getattr(self, "loss", None)  # there is none yet where the stock constructor makes its first model
        losses = loss.values() if isinstance(loss, dict) else [loss]
        return [loss for loss in losses if isinstance(loss, nn.Module)]  # others make one of the model of each run

    def _freeze_guides(self) -> None:
        # GISTEmbedLoss only asks its guide, but leaves its parameters trainable, so that X-SAM would perturb them.
        model = set(super()._unwrapped_model().parameters())
        guides = [guide for loss in self._losses() if isinstance(guide := getattr(loss, "guide", None), nn.Module)]
        for parameter in (parameter for guide in guides for parameter in guide.parameters()):
            if parameter not in model:
                parameter.requires_grad_(False)

    def _parameters_of_losses(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the losses that are not the model's."""
        known = {id(parameter) for parameter in super()._unwrapped_model().parameters()}
        parameters = (parameter for loss in self._losses() for parameter in loss.parameters())
        return [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in known]

    def _get_collator_with_removed_columns(self, data_collator: Any, *args: Any, **kwargs: Any) -> Any:
        return data_collator  # as in sentence-transformers' data loaders: the collator chooses among the columns

    def _steps_through_loss(self) -> bool:
        return isinstance(self.loss, nn.Module) and bool(self._parameters_of_losses())

    def _unwrapped_model(self) -> nn.Module:
        return self.loss if self._steps_through_loss() else super()._unwrapped_model()

    def _begin_steps(self, kind: type[SharpnessAwareSteps] = SharpnessAwareSteps) -> SharpnessAwareSteps:
        return super()._begin_steps(_StepsOfLoss if self._steps_through_loss() else kind)


class _StepsOfLoss(SharpnessAwareSteps):
    """Steps whose model is the loss, which holds the model: gradients are cleared and set aside in both."""

    def begin_window(self, model: nn.Module, training_step: StepAgain, trainer: Any, step: int) -> Window:
        def step_again(_: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
            return training_step(model, micro_batch)

        return super().begin_window(self.model, step_again, trainer, step)


class XSAMSentenceTransformerTrainer(_LossesHoldModelMixin, SentenceTransformerTrainer):
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


class XSAMCrossEncoderTrainer(_LossesHoldModelMixin, CrossEncoderTrainer):
    """[`~sentence_transformers.cross_encoder.CrossEncoderTrainer`], of rerankers, with X-SAM.

    What [`XSAMSentenceTransformerTrainer`] says of losses applies.
    """


class XSAMSparseEncoderTrainer(_LossesHoldModelMixin, SparseEncoderTrainer):
    """[`~sentence_transformers.sparse_encoder.SparseEncoderTrainer`] with X-SAM.

    What [`XSAMSentenceTransformerTrainer`] says of losses applies.
    """

"""X-SAM for any `Trainer`: each optimizer step's gradient is replaced by X-SAM's."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from .config import XSAMConfig
from .correction import corrected_gradient
from .eigenvector import (
    HessianVectorProduct,
    exact_hessian_vector_product,
    finite_difference_hessian_vector_product,
    finite_difference_step,
    power_iteration,
    random_unit_vector,
)
from .perturbation import ascent_perturbation, perturbed
from .replay import MicroBatch, RandomState, Replay, gradients, side_effects_undone, twice_differentiable_attention
from .scope import in_scope, trainable_parameters
from .state import RunningMeans, XSAMState
from .support import double_backward_obstacle, refuse_unsupported
from .tensors import dot, norm, reciprocal_or_zero, scale

logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

# When the perturbed loss counts as far above the loss, and for how many logs before a warning.
LARGE_SHARPNESS = 0.5
PATIENCE = 3

if TYPE_CHECKING:
    _Trainer = Trainer  # what the mixin stands in front of
else:
    _Trainer = object


class XSAMTrainerMixin(_Trainer):
    """Put in front of a `Trainer` subclass, turns its steps into X-SAM's (arXiv 2601.10251).

    `class MyXSAMTrainer(XSAMTrainerMixin, MyTrainer)` works as `MyTrainer` does, with one more argument.

    Args:
        xsam_config ([`XSAMConfig`], *optional*):
            Settings of X-SAM; the paper's by default.
        *args, **kwargs:
            Passed on to the trainer.

    Attributes:
        xsam_config: the settings.
        xsam_state ([`~hf_xsam.state.XSAMState`]): eigenvector, eigenvalue and step count.

    Raises:
        ValueError: for a set-up that X-SAM cannot work with, with what to use instead.
    """

    def __init__(self, *args: Any, xsam_config: XSAMConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(xsam_config, XSAMConfig | None):
            raise TypeError(f"xsam_config is a {type(xsam_config).__name__}; it must be an XSAMConfig.")
        super().__init__(*args, **kwargs)
        self.xsam_config = XSAMConfig() if xsam_config is None else xsam_config
        self.xsam_state = XSAMState()
        self._xsam_window: list[MicroBatch] = []
        self._xsam_metrics = RunningMeans()
        # Set at the first product, which shows what the model allows.
        self._xsam_hvp_method = "finite_difference" if self.xsam_config.hvp == "finite_difference" else None
        self._xsam_logs_far_above = 0
        refuse_unsupported(self)
        self._eigen_parameters()  # an eigen_scope that matches nothing is refused now

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the stock step; after the last micro-batch of a window, put X-SAM's gradient in place of the sum.

        Returns:
            The stock step's loss, at the unperturbed weights.
        """
        kept_inputs, random_state = copy(inputs), RandomState.capture(self.args.device)
        try:
            with self.accelerator.no_sync(model) if self.xsam_config.ascent == "local" else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch)
            self._xsam_window.append(MicroBatch(kept_inputs, num_items_in_batch, random_state, loss))
            if self.accelerator.sync_gradients:
                replay = Replay(super().training_step, self.accelerator, model, self._xsam_window)
                with self._side_effects_undone(model):
                    self._sharpness_aware_gradient(replay)
                self._xsam_window = []
        except BaseException:
            self._xsam_window = []
            raise
        return loss

    def _side_effects_undone(self, model: nn.Module) -> AbstractContextManager[None]:
        """Undo what training steps within the block leave behind, so that each step counts once.

        To be extended for trainers that count in their steps, as [`hf_xsam.integrations.trl`] does.
        """
        return side_effects_undone(model, self.args.device)

    def _sharpness_aware_gradient(self, replay: Replay) -> None:
        """Replace the window's gradient g in `.grad` by the corrected gradient d."""
        config, step = self.xsam_config, self.state.global_step
        parameters = {name: p for name, p in self._trainable_parameters().items() if p.grad is not None}
        weights = list(parameters.values())
        gradient = gradients(weights)
        loss = torch.stack([micro_batch.loss for micro_batch in replay.micro_batches]).sum()
        metrics = {"gradient_norm": norm(gradient) / self._loss_scale()}

        if config.refreshes_at(step):
            self._refresh_eigenvector(replay)
        with perturbed(weights, ascent_perturbation(weights, gradient, config.rho_at(step), config.adaptive)):
            del gradient  # its memory goes to the replay's
            metrics["perturbed_loss"] = replay.run()
        metrics["sharpness"] = metrics["perturbed_loss"] - loss

        # What the second pass did not reach stays without a gradient, as it would in the stock Trainer.
        parameters = {name: p for name, p in parameters.items() if p.grad is not None}
        gradient = gradients(list(parameters.values()))
        metrics["perturbed_gradient_norm"] = norm(gradient) / self._loss_scale()
        if config.corrects_at(step) and self.xsam_state.eigenvalue is not None:
            eigenvector = self.xsam_state.eigenvector_over(parameters)
            corrected = corrected_gradient(
                gradient, eigenvector, config.alpha, config.correction, config.normalize_gradient
            )
            # The optimizer's unscaling is still to come: a gradient of norm 1 needs the GradScaler's factor again.
            factor = self._loss_scale() if config.normalize_gradient else torch.ones_like(self._loss_scale())
            metrics |= {"eigenvalue": self.xsam_state.eigenvalue, **_alignment(gradient, eigenvector)}
            for old, new in zip(gradient, scale(factor, corrected), strict=True):
                old.copy_(new)
        self.xsam_state.step = step + 1
        self._xsam_metrics.add({f"xsam/{name}": value for name, value in metrics.items()})

    def _refresh_eigenvector(self, replay: Replay) -> None:
        """Run power iterations on the window's loss at the weights as they stand, from the last eigenvector."""
        state, scope = self.xsam_state, self._eigen_parameters()
        parameters = list(scope.values())
        local = self.xsam_config.ascent == "local"
        product = self._hessian_vector_product(
            parameters,
            replay.losses,
            keep_graph=len(replay.micro_batches) == 1,
            gradient_here=lambda: replay.gradient(parameters, synchronize=not local),
            gradient_is_local=local,
            gradient=gradients(parameters),
        )
        start = state.warm_start(scope) or random_unit_vector(parameters, self.args.seed)
        estimate = power_iteration(product, start, self.xsam_config.power_iterations, state.shift)
        state.eigenvector = dict(zip(scope, estimate.vector, strict=True))
        state.eigenvalue, state.shift = estimate.value, estimate.shift

    def _hessian_vector_product(
        self,
        parameters: Sequence[Tensor],
        losses: Callable[[], Iterator[Tensor]],
        keep_graph: bool,
        gradient_here: Callable[[], list[Tensor]],
        gradient_is_local: bool,
        gradient: Sequence[Tensor] | None = None,
    ) -> HessianVectorProduct:
        """Return v -> H v of the unscaled loss over all processes' batches, by the configured or chosen method.

        `gradient` is the gradient at the weights as they stand, where it is known already.
        """
        if self._xsam_hvp_method is None:
            asked = self.xsam_config.hvp == "exact"
            obstacle = double_backward_obstacle(next(losses()), parameters, trust_python_functions=asked)
            if obstacle and asked:
                raise RuntimeError(
                    f"XSAMConfig.hvp is 'exact', but the model has no second derivative: {obstacle} "
                    "Use hvp='finite_difference' or hvp='auto'."
                )
            self._xsam_hvp_method = "finite_difference" if obstacle else "exact"
            reason = obstacle or "every operation of the model has a second derivative"
            logger.info("X-SAM computes Hessian-vector products with hvp=%r: %s.", self._xsam_hvp_method, reason)
        if self._xsam_hvp_method == "exact":
            scaled = exact_hessian_vector_product(losses, parameters, keep_graph)
        else:
            step = finite_difference_step(parameters, self._precision(parameters))
            known = gradient_here() if gradient is None else gradient
            scaled = finite_difference_hessian_vector_product(gradient_here, parameters, known, step)
        reduce = self.accelerator.num_processes > 1 and (self._xsam_hvp_method == "exact" or gradient_is_local)

        def product(vector: Sequence[Tensor]) -> list[Tensor]:
            result = scale(1 / self._loss_scale(), scaled(vector))
            return self.accelerator.reduce(result, reduction="mean") if reduce else result

        return product

    def top_eigenpair(
        self, batches: Sequence[Mapping[str, Any]], iterations: int = 20
    ) -> tuple[dict[str, Tensor], float]:
        """Estimate the top eigenpair of the Hessian of the mean loss over `batches`, in evaluation mode.

        Args:
            batches: collated batches, of one size for a plain mean; each is one forward and double backward
                pass an iteration. With several processes, each brings its own.
            iterations: power iterations, from a random start.

        Returns:
            The eigenvector by parameter name, jointly of norm 1, and the eigenvalue.
        """
        scope = self._eigen_parameters()
        parameters = list(scope.values())
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

        def losses() -> Iterator[Tensor]:
            for batch in batches:
                with twice_differentiable_attention(), self.accelerator.autocast():
                    loss = self.compute_loss(model, send_to_device(dict(batch), self.args.device))
                assert isinstance(loss, Tensor)  # a tuple only with return_outputs
                yield self._loss_scale() * loss / len(batches)

        def gradient_here() -> list[Tensor]:
            total = [torch.zeros_like(p) for p in parameters]
            for loss in losses():
                for sum_, term in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if term is not None:
                        sum_.add_(term)
            return total

        training = model.training
        model.eval()
        try:
            with self._side_effects_undone(model):
                product = self._hessian_vector_product(
                    parameters, losses, len(batches) == 1, gradient_here, gradient_is_local=True
                )
                start = random_unit_vector(parameters, self.args.seed)
                estimate = power_iteration(product, start, iterations)
        finally:
            model.train(training)
        return dict(zip(scope, estimate.vector, strict=True)), estimate.value.item()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Start X-SAM's state afresh with a fresh model; a warm start set before the first run stays."""
        model = super().call_model_init(trial)
        state = getattr(self, "xsam_state", None)  # the stock constructor calls this before X-SAM's has run
        if state is not None and state.eigenvalue is not None:
            self.xsam_state = XSAMState()
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, without what an earlier call that stopped within a window has left."""
        self._xsam_window, self._xsam_metrics = [], RunningMeans()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log X-SAM's metrics, averaged as the loss is, beside the training loss."""
        if "loss" in logs:
            names, means = self._xsam_metrics.take()
            if means is not None:
                if self.accelerator.num_processes > 1:
                    means = self.accelerator.reduce(means, reduction="mean")
                logs.update(zip(names, means.tolist(), strict=True))
                self._warn_of_large_rho(logs)
        super().log(logs, *args, **kwargs)

    def _warn_of_large_rho(self, logs: Mapping[str, float]) -> None:
        if self._xsam_logs_far_above == PATIENCE:
            return  # said already
        far_above = logs["xsam/sharpness"] > LARGE_SHARPNESS * abs(logs["loss"])
        self._xsam_logs_far_above = self._xsam_logs_far_above + 1 if far_above else 0
        if self._xsam_logs_far_above == PATIENCE:
            logger.warning(
                "The perturbed loss has been more than %g times the loss for %d logs in a row (last: %.3g and %.3g). "
                "If the loss does not fall, lower rho (it is %g) or raise it slowly with rho_warmup_steps.",
                1 + LARGE_SHARPNESS,
                PATIENCE,
                logs["xsam/perturbed_loss"],
                logs["loss"],
                self.xsam_config.rho,
            )

    def _trainable_parameters(self) -> dict[str, nn.Parameter]:
        return trainable_parameters(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _eigen_parameters(self) -> dict[str, nn.Parameter]:
        return in_scope(self._trainable_parameters(), self.xsam_config.eigen_scope)

    def _loss_scale(self) -> Tensor:
        """Return the factor that the GradScaler has on losses and gradients, 1 without one."""
        one = torch.ones((), device=self.args.device)
        return one if self.accelerator.scaler is None else self.accelerator.scaler.scale(one)

    def _precision(self, parameters: Sequence[Tensor]) -> torch.dtype:
        """Return the coarsest dtype that the loss is computed in."""
        autocast = AUTOCAST_DTYPES.get(self.accelerator.mixed_precision)
        return autocast or max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)


def _alignment(gradient: Sequence[Tensor], eigenvector: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the cosine <a, v> / norm(a) between gradient and eigenvector, and its angle in degrees, 0 to 180."""
    cosine = dot(gradient, eigenvector) * reciprocal_or_zero(norm(gradient))
    return {"cosine": cosine, "angle_degrees": torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))}


class XSAMTrainer(XSAMTrainerMixin, Trainer):
    """[`~transformers.Trainer`] with X-SAM: takes `xsam_config` beside the arguments of `Trainer`."""


class XSAMSeq2SeqTrainer(XSAMTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `Seq2SeqTrainer`."""

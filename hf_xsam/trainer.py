"""X-SAM for any `Trainer`: each optimizer step's gradient is replaced by X-SAM's."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from .config import XSAMConfig
from .functional.correction import correction_factors
from .functional.perturbation import ascent_perturbation, perturbed
from .functional.power_iteration import first_vector, power_iteration, random_unit_vector
from .functional.tensors import dot, is_sharded, norm, set_to_combination
from .saving.checkpoint import last_complete_checkpoint, load_state, save_state
from .saving.hub import PushCallback, refusal_explained
from .saving.model_card import complete_model_card, prepare_adapter_card
from .state import XSAMState
from .step.curvature import Loss, choose_method, hessian_vector_product, mean_loss
from .step.logs import Advice, RunningMeans, alignment
from .step.precision import all_finite, holds_everywhere, leave_harmless_gradient, loss_scale
from .step.refusals import obstacle_in_arguments, refuse_optimizer, refuse_unsupported
from .step.replay import (
    MicroBatch,
    Replay,
    copied,
    evaluating,
    gradients,
    gradients_set_aside,
    reshard,
    with_gradient,
)
from .step.scope import in_scope, parameters_in_scope, trainable_parameters
from .step.side_effects import Buffers, RandomState, devices_of, logs_dropped, side_effects_undone

if TYPE_CHECKING:
    _Trainer = Trainer  # what the mixin stands in front of
else:
    _Trainer = object


class XSAMTrainerMixin(_Trainer):
    """Put in front of a `Trainer` subclass, turns its steps into X-SAM's (arXiv 2601.10251).

    `class MyXSAMTrainer(XSAMTrainerMixin, MyTrainer)` works as `MyTrainer` does, with one more argument.

    Args:
        xsam_config ([`XSAMConfig`], *optional*):
            Settings of X-SAM; by default `XSAMConfig()`, the paper's update with a cheaper estimate of v.
        *args, **kwargs:
            Passed on to the trainer.

    Attributes:
        rows_are_examples: whether each row of a batch is an example of its own, as it must be for a part of the batch
            to have a loss like the whole's; to be set to `False` by trainers of, say, pairs in different rows.
        xsam_config: the settings.
        xsam_state ([`~hf_xsam.state.XSAMState`]): eigenvector, eigenvalue and step count.

    Raises:
        ValueError: for a set-up that X-SAM cannot work with, with what to use instead.
    """

    rows_are_examples = True

    def __init__(self, *args: Any, xsam_config: XSAMConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(xsam_config, XSAMConfig | None):
            raise TypeError(f"xsam_config is a {type(xsam_config).__name__}; it must be an XSAMConfig.")
        super().__init__(*args, **kwargs)
        self.xsam_config = XSAMConfig() if xsam_config is None else xsam_config
        self.xsam_state = XSAMState()
        self._xsam_window: list[MicroBatch] = []
        self._xsam_metrics, self._xsam_advice = RunningMeans(), Advice(self.xsam_config)
        self._xsam_hvp_method: str | None = None  # chosen at the first product, which shows what the model allows
        refuse_unsupported(self, self.xsam_config)
        for field in ("perturb_scope", "eigen_scope"):
            self._parameters_in(field)  # a scope that matches nothing is refused now
        if self.args.push_to_hub:
            self.add_callback(PushCallback(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the stock step; after the last micro-batch of a window, put X-SAM's gradient in place of the sum.

        Returns:
            The stock step's loss, at the unperturbed weights.
        """
        kept_inputs, random_state = copied(inputs), RandomState.capture(devices_of(model, self.args.device))
        if not self._xsam_window:
            self._xsam_buffers = Buffers.capture(model)
        try:
            with self.accelerator.no_sync(model) if self.xsam_config.ascent == "local" else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch)
            steps = getattr(self, "current_gradient_accumulation_steps", 1)  # the Trainer sets it in train()
            self._xsam_window.append(MicroBatch(kept_inputs, num_items_in_batch, random_state, loss, steps))
            if self.accelerator.sync_gradients:
                window, buffers = self._xsam_window, self._xsam_buffers
                replay = Replay(self._step_again, self.accelerator, model, window, buffers)
                with self._side_effects_undone(model):
                    self._sharpness_aware_gradient(replay)
                self._xsam_window = []
                del self._xsam_buffers  # a copy that the next window does not need
                self.xsam_state.step = self.state.global_step + 1
        except BaseException:
            self._xsam_window = []
            model.zero_grad()
            raise
        return loss

    def _step_again(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        # Micro-batches left over from the end of data without a length have another divisor than the window's last one.
        self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
        items = micro_batch.num_items_in_batch  # of a part of the rows no whole number, which the stock step allows
        return super().training_step(model, copied(micro_batch.inputs), items)  # type: ignore[arg-type]

    @contextmanager
    def _side_effects_undone(self, model: nn.Module) -> Iterator[None]:
        """Undo what training steps within the block leave behind, so that each step counts once.

        To be extended for trainers that count in their steps, as [`hf_xsam.integrations.trl`] does.
        """
        with logs_dropped(self), side_effects_undone(model, self.args.device):
            yield

    def _sharpness_aware_gradient(self, replay: Replay) -> None:
        """Replace the window's gradient g in `.grad` by the corrected gradient d."""
        config, step = self.xsam_config, self.state.global_step
        trainable = trainable_parameters(self._unwrapped_model())
        if self._nothing_learnt(trainable):
            self.xsam_state.skipped_steps += 1
            return
        weights = list(self._parameters_in("perturb_scope").values())
        gradient = gradients(weights)
        unscaled, rho = 1 / loss_scale(self.accelerator), config.rho_at(step)
        loss = torch.stack([micro_batch.loss for micro_batch in replay.micro_batches]).sum()
        metrics = {"gradient_norm": norm(gradients(list(with_gradient(trainable).values()))) * unscaled}

        refresh_is_due = config.refreshes_at(step, self.xsam_state.refreshed_at)
        refresh_failed = refresh_is_due and not self._refresh_eigenvector(replay)
        with perturbed(weights, ascent_perturbation(weights, gradient, rho, config.adaptive)) as realised:
            del gradient  # its memory goes to the replay's
            metrics["perturbed_loss"] = replay.run()
        metrics["sharpness"] = metrics["perturbed_loss"] - loss
        if realised is not None and rho > 0:
            metrics["realised_perturbation"] = realised

        # What the second pass did not reach stays without a gradient, as it would in the stock Trainer.
        parameters = with_gradient(trainable)
        gradient = gradients(list(parameters.values()))
        length = norm(gradient)
        metrics["perturbed_gradient_norm"] = length * unscaled
        scaler_skips = refresh_failed and self.accelerator.scaler is not None
        if scaler_skips or not all_finite(self.accelerator, metrics.values()):
            leave_harmless_gradient(replay, list(trainable.values()))
            self.xsam_state.skipped_steps += 1
            return
        if config.corrects_at(step) and self.xsam_state.eigenvalue is not None:
            eigenvector = self.xsam_state.eigenvector_over(parameters)
            along = dot(gradient, eigenvector)
            metrics |= {"eigenvalue": self.xsam_state.eigenvalue, **alignment(along, length)}
            size, change = correction_factors(length, along, config.alpha, config.correction, config.normalize_gradient)
            # The optimizer's unscaling is still to come: a gradient of norm 1 needs the GradScaler's factor again.
            factor = 1 / unscaled if config.normalize_gradient else torch.ones_like(unscaled)
            set_to_combination(gradient, factor * size, eigenvector, factor * change)
        self._xsam_metrics.add({f"xsam/{name}": value for name, value in metrics.items()})

    def _nothing_learnt(self, trainable: Mapping[str, nn.Parameter]) -> bool:
        """Return whether the window left no gradient: a training step may skip a batch, or its loss need no weight."""
        nothing = not with_gradient(trainable)
        if self.xsam_config.ascent == "local":  # else the gradient is that of all processes
            return holds_everywhere(self.accelerator, torch.tensor(nothing, device=self.args.device))
        return nothing

    def _refresh_eigenvector(self, replay: Replay) -> bool:
        """Run power iterations on the window's loss at the weights as they stand, from the last eigenvector.

        Returns:
            Whether all was finite; if not, the state is left as it was and the next step tries again.
        """
        state, scope = self.xsam_state, self._parameters_in("eigen_scope")
        parameters = list(scope.values())
        gradient = gradients(parameters)
        if not all_finite(self.accelerator, [norm(gradient)]):
            return False
        local = self.xsam_config.ascent == "local"
        part = replay.part(self.xsam_config.eigen_batch_fraction, self.rows_are_examples)
        loss = Loss(
            terms=lambda: replay.losses(part),
            gradient=lambda parameters: replay.gradient(parameters, synchronize=not local),
            gradient_is_local=local,
            single_term=len(part) == 1,
        )
        start = state.warm_start(scope)
        if start is None:
            whole = self.accelerator.reduce(gradient, reduction="mean") if local else gradient
            start = first_vector(whole, self.args.seed)
        momentum = self.xsam_config.eigen_momentum_at(self.state.global_step)
        if self._xsam_hvp_method is None:
            self._xsam_hvp_method = self._choose_method(loss, parameters)
        model, method = self._unwrapped_model(), self._xsam_hvp_method
        with hessian_vector_product(self.accelerator, method, loss, parameters, model, gradient) as product:
            estimate = power_iteration(product, start, self.xsam_config.power_iterations, state.shift, momentum)
        if not estimate.is_finite():
            return False
        state.eigenvector = dict(zip(scope, estimate.vector, strict=True))
        state.eigenvalue, state.shift = estimate.value, estimate.shift
        state.refreshed_at = self.state.global_step
        return True

    def _choose_method(self, loss: Loss, parameters: Sequence[Tensor]) -> str:
        obstacle = obstacle_in_arguments(self.args)
        model = self._unwrapped_model()
        return choose_method(self.accelerator, self.xsam_config.hvp, loss, parameters, model, obstacle)

    def top_eigenpair(
        self, batches: Sequence[Mapping[str, Any]], iterations: int = 20
    ) -> tuple[dict[str, Tensor], float]:
        """Estimate the top eigenpair of the Hessian of the mean loss over `batches`, in evaluation mode.

        Args:
            batches: collated batches, of one size for a plain mean; an iteration takes a Hessian-vector product of
                each. With several processes, each brings its own.
            iterations: power iterations, from a random start, at least 1.

        Returns:
            The eigenvector by parameter name, jointly of norm 1, and the eigenvalue.

        Raises:
            ValueError: without batches or iterations.
        """
        if isinstance(batches, Mapping) or not batches:
            raise ValueError(f"batches is {type(batches).__name__} of {len(batches)}; it must be a list of batches.")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; it must be at least 1.")
        model = self._unwrapped_model()
        reshard(model)
        scope = self._parameters_in("eigen_scope")
        parameters = list(scope.values())

        def loss_on(batch: Mapping[str, Any]) -> Tensor:
            loss = self.compute_loss(model, send_to_device(copied(batch), self.args.device))
            assert isinstance(loss, Tensor)  # a tuple only with return_outputs
            return loss

        with evaluating(model), self._side_effects_undone(model), gradients_set_aside(model):
            batch_losses = [partial(loss_on, batch) for batch in batches]
            loss = mean_loss(self.accelerator, model, batch_losses, sharded=is_sharded(parameters[0]))
            start = random_unit_vector(parameters, self.args.seed)
            method = self._choose_method(loss, parameters)
            with hessian_vector_product(self.accelerator, method, loss, parameters, model) as product:
                estimate = power_iteration(product, start, iterations)
        return dict(zip(scope, estimate.vector, strict=True)), estimate.value.item()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, and refuse one that X-SAM cannot work with."""
        optimizer = super().create_optimizer(*args, **kwargs)
        refuse_optimizer(self)  # what it has set, for the Trainer leaves out what it returns
        return optimizer

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Start X-SAM's state afresh with a fresh model; a warm start set before the first run stays."""
        model = super().call_model_init(trial)
        state = getattr(self, "xsam_state", None)  # the stock constructor calls this before X-SAM's has run
        if state is not None and state.step > 0:
            self.xsam_state = XSAMState()
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, without what an earlier call that stopped within a window has left.

        `resume_from_checkpoint=True` resumes from the newest checkpoint that was written to its end.
        """
        self._xsam_window, self._xsam_metrics = [], RunningMeans()
        self._xsam_hvp_method = None  # the model may be another one
        if resume_from_checkpoint is True:
            ranks = [self.args.process_index] if self.args.save_on_each_node else None
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir), ranks)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log X-SAM's metrics, averaged as the loss is, beside the training loss.

        Raises:
            RuntimeError: where steps were taken and no `training_step` of X-SAM's, for a subclass has left it out.
        """
        if "loss" in logs:
            if self.xsam_state.step < self.state.global_step:
                raise RuntimeError(
                    f"{type(self).__name__}'s training_step did not call X-SAM's. Call super().training_step in it, or "
                    "put the mixin in front: class MyXSAMTrainer(XSAMTrainerMixin, MyTrainer)."
                )
            logs["xsam/skipped_steps"] = self.xsam_state.skipped_steps
            steps = self._xsam_metrics.steps
            names, means = self._xsam_metrics.take()
            if means is not None:
                if self.accelerator.num_processes > 1:
                    means = self.accelerator.reduce(means, reduction="mean")
                logs.update(zip(names, means.tolist(), strict=True))
            if self.is_world_process_zero():
                self._xsam_advice.read(logs, steps)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and X-SAM's settings beside it as `xsam_config.json`."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.xsam_config.save_pretrained(output_dir or str(self.args.output_dir))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the stock card, and add what X-SAM has to say: see [`hf_xsam.saving.model_card`]."""
        if self.is_world_process_zero():
            prepare_adapter_card(self)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_model_card(self, self.xsam_config, kwargs.get("finetuned_from"))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository; where the hub refuses the token, the error says what to do."""
        with refusal_explained(self):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push model, settings and card; where the hub refuses the token, the error says what to do."""
        with refusal_explained(self):
            return super().push_to_hub(*args, **kwargs)

    def _unwrapped_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _parameters_in(self, field: str) -> dict[str, nn.Parameter]:
        model = self._unwrapped_model()
        return parameters_in_scope(model, getattr(self.xsam_config, field), f"XSAMConfig.{field}")

    # The Trainer's own methods, without which its checkpoints would lack X-SAM's state. They are called on every
    # process, before the checkpoint's last file is written, and once the model and its optimizer are loaded.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(self.xsam_state, self.xsam_config, output_dir, self.accelerator, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # Frozen ones too, for a callback may yet unfreeze them, as it did before the checkpoint.
            model = self._unwrapped_model()
            parameters = in_scope(dict(model.named_parameters()), self.xsam_config.eigen_scope, model)
            state = load_state(checkpoint, self.xsam_config, parameters, self.accelerator)
            self.xsam_state = state or XSAMState()


class XSAMTrainer(XSAMTrainerMixin, Trainer):
    """[`~transformers.Trainer`] with X-SAM: takes `xsam_config` beside the arguments of `Trainer`."""


class XSAMSeq2SeqTrainer(XSAMTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `Seq2SeqTrainer`."""

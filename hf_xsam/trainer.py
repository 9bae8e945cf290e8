"""X-SAM for any `Trainer`: each optimizer step's gradient is replaced by X-SAM's."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from .config import XSAMConfig
from .functional.correction import correction_factors
from .functional.perturbation import ascent_perturbation, perturbed
from .functional.power_iteration import first_vector
from .functional.tensors import dot, norm, set_to_combination
from .saving.checkpoint import last_complete_checkpoint, load_state, save_state
from .saving.hub import PushCallback, refusal_explained
from .saving.model_card import complete_model_card, prepare_adapter_card
from .state import XSAMState
from .step.curvature import Curvature, TopEigenpair, top_eigenpair
from .step.double_backward import Method, obstacle_in_arguments
from .step.echo import check_echo, marks_of
from .step.gradients import gradient_norm, gradients, gradients_set_aside, with_gradient
from .step.logs import SKIPPED_STEPS, Advice, RunningMeans, alignment, chosen_metrics
from .step.precision import loss_scale
from .step.processes import all_finite, holds_everywhere
from .step.refusals import (
    refuse_gradients_left,
    refuse_optimizer,
    refuse_optimizer_in_hooks,
    refuse_unsupported,
)
from .step.replay import MicroBatch, Window
from .step.scope import in_scope, parameters_in_scope, trainable_parameters
from .step.side_effects import Surroundings, copied, logs_dropped

if TYPE_CHECKING:
    _Trainer = Trainer  # what the mixin stands in front of
else:
    _Trainer = object


Parameters = Mapping[str, nn.Parameter]


class XSAMTrainerMixin(_Trainer):
    """Put in front of a `Trainer` subclass, turns its steps into X-SAM's (arXiv 2601.10251).

    `class MyXSAMTrainer(XSAMTrainerMixin, MyTrainer)` works as `MyTrainer` does, with one more argument.

    Args:
        xsam_config ([`XSAMConfig`] or `dict`, *optional*):
            Settings of X-SAM, or some of its fields as a dictionary; by default `XSAMConfig()`.
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

    _xsam_window: Window | None  # what is gathered of the optimizer step under way
    _xsam_surroundings: Surroundings | None  # found at the first step of a training
    _xsam_checked: bool  # whether a step run again was seen to be the same
    _xsam_rows_add_up: bool | None  # whether the losses of a batch's rows do; found out at the first product
    _xsam_hvp_method: Method | None  # chosen at the first product of a training, which shows what the model allows

    def __init__(self, *args: Any, xsam_config: XSAMConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(xsam_config, dict | None):
            xsam_config = XSAMConfig.from_dict(xsam_config or {})
        if not isinstance(xsam_config, XSAMConfig):
            raise TypeError(f"xsam_config is a {type(xsam_config).__name__}; it must be an XSAMConfig or a dict.")
        super().__init__(*args, **kwargs)
        self.xsam_config = xsam_config
        self.xsam_state = XSAMState()
        self._xsam_advice = Advice(self.xsam_config)
        self._begin_afresh()
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
        if self._xsam_window is None:
            self._xsam_window = self._new_window(model)
        window = self._xsam_window
        kept_inputs, random_state = copied(inputs), window.surroundings.random_state()
        try:
            with self.accelerator.no_sync(model) if self.xsam_config.ascent == "local" else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch)
            steps = getattr(self, "current_gradient_accumulation_steps", 1)  # the Trainer sets it in train()
            window.micro_batches.append(MicroBatch(kept_inputs, num_items_in_batch, random_state, loss, steps))
            if self.accelerator.sync_gradients:
                self._xsam_window = None
                with logs_dropped(self), window.surroundings.undone() as window.after:
                    self._sharpness_aware_gradient(window)
                self.xsam_state.step = self.state.global_step + 1
        except BaseException:
            self._xsam_window = None
            model.zero_grad()
            raise
        return loss

    def _new_window(self, model: nn.Module) -> Window:
        refuse_gradients_left(trainable_parameters(self._unwrapped_model()))
        if self._xsam_surroundings is None:
            self._xsam_surroundings = Surroundings(self._unwrapped_model(), self.args.device, self)
        check_is_due = {"first": not self._xsam_checked, "every": True, "never": False}[self.xsam_config.replay_check]
        marks = marks_of(self._xsam_surroundings.owners) if check_is_due else None
        return Window(self._step_again, self.accelerator, model, self._xsam_surroundings, marks)

    def _step_again(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        # Micro-batches left over from the end of data without a length have another divisor than the window's last one.
        self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
        items = micro_batch.num_items_in_batch  # of a part of the rows no whole number, which the stock step allows
        return super().training_step(model, copied(micro_batch.inputs), items)  # type: ignore[arg-type]

    def _sharpness_aware_gradient(self, window: Window) -> None:
        """Replace the window's gradient g in `.grad` by the corrected gradient d."""
        trainable = trainable_parameters(self._unwrapped_model())
        if window.marks is not None:
            refuse_optimizer_in_hooks(trainable)
        if self._nothing_learnt(trainable):
            self.xsam_state.skipped_steps += 1
            return
        self._check_replay(window, trainable)
        refreshed = self._refresh_eigenvector(window)
        metrics = self._gradient_at_perturbed_weights(window, trainable)
        if self._is_usable(metrics, refreshed):
            self._xsam_metrics.add(metrics | self._correct(trainable, metrics["perturbed_gradient_norm"]))
        else:
            window.leave_harmless_gradient(list(trainable.values()))
            self.xsam_state.skipped_steps += 1

    def _nothing_learnt(self, trainable: Parameters) -> bool:
        """Return whether the window left no gradient: a training step may skip a batch, or its loss need no weight."""
        nothing = not with_gradient(trainable)
        if self.xsam_config.ascent == "local":  # else the gradient is that of all processes
            return holds_everywhere(self.accelerator, nothing)
        return nothing

    def _check_replay(self, window: Window, trainable: Parameters) -> None:
        """Where it is due, warn if the window gives another loss or gradient at the same weights."""
        if window.marks is not None:
            synchronize = self.xsam_config.ascent != "local"
            self._xsam_checked = check_echo(window, list(trainable.values()), synchronize, window.marks)

    def _refresh_eigenvector(self, window: Window) -> bool:
        """Where it is due, run power iterations on the window's loss at w, from the last eigenvector.

        Returns:
            False where something was not finite: the state is left as it was, and the next step tries again.
        """
        config, state, step = self.xsam_config, self.xsam_state, self.state.global_step
        if not config.refreshes_at(step, state.refreshed_at):
            return True
        scope = self._parameters_in("eigen_scope")
        gradient = gradients(list(scope.values()))
        if not all_finite(self.accelerator, [norm(gradient)]):
            return False
        curvature = self._curvature(window, list(scope.values()))
        start = state.warm_start(scope) or self._first_vector(gradient)
        with gradients_set_aside(window.model):
            estimate = curvature.top_eigenpair(
                start, config.power_iterations, state.shift, config.eigen_momentum_at(step), gradient
            )
        self._xsam_hvp_method = curvature.method
        if estimate.is_finite():
            state.take(estimate, scope, step)
            return True
        return False

    def _curvature(self, window: Window, parameters: Sequence[nn.Parameter]) -> Curvature:
        config = self.xsam_config
        if self._xsam_rows_add_up is None:  # else each row may have a loss that is no part of the batch's
            self._xsam_rows_add_up = config.eigen_batch_fraction == 1 or window.rows_add_up()
        rows_are_examples = self.rows_are_examples and self._xsam_rows_add_up
        loss = window.loss_of_part(config.eigen_batch_fraction, rows_are_examples, config.ascent != "local")
        obstacle = obstacle_in_arguments(self.args)
        model = self._unwrapped_model()
        return Curvature(self.accelerator, model, parameters, loss, config.hvp, obstacle, self._xsam_hvp_method)

    def _first_vector(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        if self.xsam_config.ascent == "local":
            gradient = self.accelerator.reduce(gradient, reduction="mean")
        return first_vector(gradient, self.args.seed)

    def _gradient_at_perturbed_weights(self, window: Window, trainable: Parameters) -> dict[str, Tensor]:
        """Put the gradient a at w + eps in place of g in `.grad`; return what is known of both passes."""
        config, scale = self.xsam_config, loss_scale(self.accelerator)
        weights = list(self._parameters_in("perturb_scope").values())
        rho = config.rho_at(self.state.global_step)
        metrics = {"gradient_norm": gradient_norm(trainable) / scale}
        with perturbed(weights, ascent_perturbation(weights, gradients(weights), rho, config.adaptive)) as realised:
            metrics["perturbed_loss"] = window.run()
        metrics["sharpness"] = metrics["perturbed_loss"] - window.loss
        if realised is not None and rho > 0:
            metrics["realised_perturbation"] = realised
        return metrics | {"perturbed_gradient_norm": gradient_norm(trainable) / scale}

    def _is_usable(self, metrics: Mapping[str, Tensor], refreshed: bool) -> bool:
        """Return whether both passes were finite, on all processes, and with a GradScaler the refresh too."""
        scaler_skips = not refreshed and self.accelerator.scaler is not None
        return not scaler_skips and all_finite(self.accelerator, metrics.values())

    def _correct(self, trainable: Parameters, length: Tensor) -> dict[str, Tensor]:
        """Put d in place of a in `.grad`, where v is known; `length` is norm(a). Return what is known of v."""
        config, state = self.xsam_config, self.xsam_state
        if not config.corrects_at(self.state.global_step) or state.eigenvalue is None:
            return {}
        # What the second pass did not reach stays without a gradient, as it would in the stock Trainer.
        parameters = with_gradient(trainable)
        gradient, eigenvector = gradients(list(parameters.values())), state.eigenvector_over(parameters)
        scale = loss_scale(self.accelerator)  # which the gradient has, and the optimizer's unscaling takes from d
        along = dot(gradient, eigenvector) / scale
        size, change = correction_factors(length, along, config.alpha, config.correction, config.normalize_gradient)
        set_to_combination(gradient, size, eigenvector, scale * change)
        return {"eigenvalue": state.eigenvalue, **alignment(along, length)}

    def top_eigenpair(self, batches: Sequence[Mapping[str, Any]], iterations: int = 20) -> TopEigenpair:
        """Estimate the top eigenpair of the loss over `batches`: see [`hf_xsam.sharpness.top_eigenpair`]."""
        return top_eigenpair(self, batches, iterations, self.xsam_config.eigen_scope, self.xsam_config.hvp)

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
        """Train; `resume_from_checkpoint=True` resumes from the newest checkpoint that was written to its end."""
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
            steps = self._xsam_metrics.steps
            means = self._xsam_metrics.take(self.accelerator)
            metrics: dict[str, float] = {SKIPPED_STEPS: self.xsam_state.skipped_steps}
            metrics |= {f"xsam/{name}": mean for name, mean in means.items()}
            if self.is_world_process_zero():
                self._xsam_advice.read(logs | metrics, steps)
            logs.update(chosen_metrics(metrics, self.xsam_config.log_metrics))
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

    def _begin_afresh(self) -> None:
        """Drop what an earlier training has left: a part of a window, means to be logged, the kind of product."""
        self._xsam_window = self._xsam_surroundings = self._xsam_hvp_method = self._xsam_rows_add_up = None
        self._xsam_checked = False
        self._xsam_metrics = RunningMeans()

    # The Trainer's own methods. The first one is where each training begins, also where `auto_find_batch_size` tries
    # again after a step that ran out of memory.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_afresh()
        return super()._inner_training_loop(*args, **kwargs)

    # Without these, checkpoints would lack X-SAM's state. They are called on every process, before the checkpoint's
    # last file is written, and once the model and its optimizer are loaded.

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

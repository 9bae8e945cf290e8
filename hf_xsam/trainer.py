"""X-SAM for any `Trainer`: each optimizer step's gradient is replaced by X-SAM's."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from .config import XSAMConfig
from .saving.checkpoint import last_complete_checkpoint, load_state, save_state
from .saving.hub import PushCallback, refusal_explained
from .saving.model_card import complete_model_card, prepare_adapter_card
from .state import XSAMState
from .step.curvature import TopEigenpair, top_eigenpair
from .step.deepspeed import engine_of
from .step.deepspeed_refusals import refuse_deepspeed
from .step.logs import SKIPPED_STEPS, Advice, chosen_metrics
from .step.refusals import refuse_optimizer, refuse_unsupported
from .step.replay import MicroBatch
from .step.scope import in_scope, named_parameters, parameters_in_scope, trainable_parameters
from .step.sharpness_aware import SharpnessAwareSteps
from .step.side_effects import copied, logs_dropped

if TYPE_CHECKING:
    _Trainer = Trainer  # what the mixin stands in front of
else:
    _Trainer = object


class XSAMTrainerMixin(_Trainer):
    """Mixin that turns the steps of a `Trainer` subclass into X-SAM's (arXiv 2601.10251).

    `class MyXSAMTrainer(XSAMTrainerMixin, MyTrainer)` works as `MyTrainer` does, with one more argument.

    Args:
        xsam_config ([`XSAMConfig`] or `dict`, *optional*):
            Settings of X-SAM, or some of its fields as a dictionary; by default `XSAMConfig()`.
        *args, **kwargs:
            Passed on to the trainer.

    Attributes:
        rows_are_examples: whether each row of a batch is one example, so that the loss of some rows estimates the
            batch's. Set it to `False` in a trainer whose examples take several rows, such as pairs.
        xsam_config: the settings.
        xsam_state ([`~hf_xsam.state.XSAMState`]): eigenvector, eigenvalue and step count.

    Raises:
        ValueError: if X-SAM does not support the set-up; the message says what to use instead.
    """

    rows_are_examples = True

    def __init__(self, *args: Any, xsam_config: XSAMConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(xsam_config, dict | None):
            xsam_config = XSAMConfig.from_dict(xsam_config or {})
        if not isinstance(xsam_config, XSAMConfig):
            raise TypeError(f"xsam_config is a {type(xsam_config).__name__}; it must be an XSAMConfig or a dict.")
        super().__init__(*args, **kwargs)
        self.xsam_config = xsam_config
        self.xsam_state = XSAMState()
        self._xsam_advice = Advice(self.xsam_config)
        self._xsam_steps: SharpnessAwareSteps | None = None  # of a training, or of steps that are called without one
        refuse_unsupported(self, self.xsam_config)
        if self.is_deepspeed_enabled:
            refuse_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config, self.xsam_config)
        if self.optimizer is not None:
            refuse_optimizer(self.optimizer, self._unwrapped_model())
        if trainable_parameters(self._unwrapped_model()):  # a trainer of frozen weights may still evaluate
            self._refuse_empty_scopes()
        if self.args.push_to_hub:
            self.add_callback(PushCallback(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the stock step; after the last micro-batch of a window, replace the accumulated gradient by X-SAM's.

        Returns:
            The stock step's loss, at the unperturbed weights, or in one pass at the perturbed.
        """
        steps = self._xsam_steps = self._xsam_steps or self._begin_steps()
        step = self.state.global_step - self.xsam_config.first_step(self.state.max_steps)
        if step < 0:
            self._xsam_has_stepped()
            return super().training_step(model, inputs, num_items_in_batch)
        try:
            if callable(switch := getattr(self.optimizer, "train", None)):
                switch()  # as the stock step does: a schedule-free optimizer's weights may be those to evaluate
            window = steps.window or steps.begin_window(model, self._step_again, self, step)
            kept = window.kept(inputs)
            local = self.accelerator.no_sync(model) if self.xsam_config.ascent == "local" else nullcontext()
            with window.optimizer_waits():
                with steps.perturbed_in_one_pass(step), local:
                    loss = super().training_step(model, inputs, num_items_in_batch)
                accumulation_steps = getattr(self, "current_gradient_accumulation_steps", 1)  # set in train()
                window.add(kept, num_items_in_batch, loss, accumulation_steps)
                if self.accelerator.sync_gradients:
                    steps.window = None
                    with logs_dropped(self), window.passes_undone():
                        steps.replace_gradient(window, step)
            if self.accelerator.sync_gradients:
                window.step_optimizer()
                self._xsam_has_stepped()
        except BaseException:
            steps.abandon()
            raise
        return loss

    def _begin_steps(self, kind: type[SharpnessAwareSteps] = SharpnessAwareSteps) -> SharpnessAwareSteps:
        config, state, model = self.xsam_config, self.xsam_state, self._unwrapped_model()
        return kind(config, state, self.accelerator, model, self.args, self.rows_are_examples)

    def _xsam_has_stepped(self) -> None:
        if self.accelerator.sync_gradients:
            self.xsam_state.step = self.state.global_step + 1

    def _step_again(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        # Micro-batches left over from the end of data without a length have another divisor than the window's last one.
        self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
        items = micro_batch.num_items_in_batch  # of a part of the rows no whole number, which the stock step allows
        return super().training_step(model, copied(micro_batch.inputs), items)  # type: ignore[arg-type]

    def top_eigenpair(self, batches: Sequence[Mapping[str, Any]], iterations: int = 20) -> TopEigenpair:
        """Estimate the top eigenpair of the loss over `batches`: see [`hf_xsam.sharpness.top_eigenpair`]."""
        return top_eigenpair(self, batches, iterations, self.xsam_config.eigen_scope, self.xsam_config.hvp)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, and refuse one that X-SAM cannot work with."""
        optimizer = super().create_optimizer(*args, **kwargs)
        assert self.optimizer is not None  # which is what trains, for the Trainer leaves out what this returns
        refuse_optimizer(self.optimizer, self._unwrapped_model())
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
            RuntimeError: if a subclass's `training_step` does not call X-SAM's.
        """
        if "loss" in logs:
            if self.xsam_state.step < self.state.global_step:
                raise RuntimeError(
                    f"{type(self).__name__}'s training_step did not call X-SAM's. Call super().training_step in it, or "
                    "put the mixin in front: class MyXSAMTrainer(XSAMTrainerMixin, MyTrainer)."
                )
            metrics: dict[str, float] = {SKIPPED_STEPS: self.xsam_state.skipped_steps}
            if self.xsam_config.start_step:
                begun = self.state.global_step > self.xsam_config.first_step(self.state.max_steps)
                metrics["xsam/active"] = float(begun)
            counted = 0
            if self._xsam_steps is not None:
                counted = self._xsam_steps.metrics.steps
                means = self._xsam_steps.metrics.take(self.accelerator)
                metrics |= {f"xsam/{name}": mean for name, mean in means.items()}
            if self.is_world_process_zero():
                self._xsam_advice.read(logs | metrics, counted)
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

    def _refuse_empty_scopes(self) -> None:
        for field in ("perturb_scope", "eigen_scope"):
            self._parameters_in(field)

    # The Trainer's own methods. The first one is where each training begins, also where `auto_find_batch_size` tries
    # again after a step that ran out of memory.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_empty_scopes()
        self._xsam_steps, self._xsam_advice = None, Advice(self.xsam_config)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._xsam_steps is not None:
                self._xsam_steps.forget()  # what would hold this trainer in a circle of references

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
            parameters: Mapping[str, Tensor] = in_scope(named_parameters(model), self.xsam_config.eigen_scope, model)
            if (engine := engine_of(self.accelerator)) is not None:
                parameters = {name: part for name, part in engine.parts.items() if name in parameters}
            state = load_state(checkpoint, self.xsam_config, parameters, self.accelerator)
            self.xsam_state = state or XSAMState()


class XSAMTrainer(XSAMTrainerMixin, Trainer):
    """[`~transformers.Trainer`] with X-SAM: takes `xsam_config` beside the arguments of `Trainer`."""


class XSAMSeq2SeqTrainer(XSAMTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `Seq2SeqTrainer`."""

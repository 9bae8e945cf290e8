"""`XSAMCallback`: the sharpness of what any `Trainer` trains, measured along the way and logged."""

import logging
import random
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..step.deepspeed_refusals import refuse_measuring
from ..step.random_state import RandomState
from ..step.scope import parameters_in_scope
from ..step.side_effects import Surroundings, copied, logs_dropped
from .measuring import Sharpness, measure
from .settings import MeasureSettings

logger = logging.getLogger(__name__)


class XSAMCallback(TrainerCallback):
    """Measures sharpness every `every` optimizer steps and at the end of training, of any trainer's loss.

        trainer = Trainer(...)
        trainer.add_callback(XSAMCallback(trainer, every=50))

    It measures the same examples each time, in evaluation mode and in the trainer's precision; with several processes,
    each measures all of them. It logs `sharpness/loss`, `sharpness/gradient_norm`, `sharpness/top_eigenvalue`,
    `sharpness/gradient_angle_degrees` (between gradient and top eigenvector, 0 to 90), `sharpness/sam_sharpness`
    (L(w + rho * g / norm(g)) - L(w)) and `sharpness/trace`, for the trainer's reports and its `trainer_state.json`.
    With several rhos, each has its own key, such as `sharpness/sam_sharpness_0.01`. Training is the same, bit for bit,
    as without the callback. A measurement that fails, because the loss is not finite or memory runs out, is skipped
    with a warning.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer whose loss, model, precision and data collator are used. (A callback's methods get no trainer.)
        every (`int`, *optional*):
            Optimizer steps between two measurements, at least 1; None measures only at the end of training.
        samples (`int`, *optional*, defaults to 256):
            Number of examples to measure on, chosen at random once.
        dataset (*optional*):
            The examples to choose from, of the trainer's own kind and with a length; by default its `train_dataset`.
        settings ([`~hf_xsam.sharpness.MeasureSettings`], *optional*):
            What to measure, by default `MeasureSettings(rhos=[0.05], trace_samples=0)`. Of several eigenpairs, only the
            first is logged. Slices are not logged, so they are not measured either, whatever `slice_points` is. The
            seed also chooses the examples; it is not the trainer's.

    Raises:
        ValueError: for a value that is not allowed, data without a length, and FSDP.
        ImportError: if scipy is missing.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int | None = None,
        samples: int = 256,
        dataset: Any = None,
        settings: MeasureSettings | None = None,
    ) -> None:
        for name, value in (("every", every), ("samples", samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        data = trainer.train_dataset if dataset is None else dataset
        if not hasattr(data, "__len__"):
            raise ValueError(
                f"XSAMCallback needs data with a length, which a {type(data).__name__} does not have: pass dataset=, a "
                "list of examples."
            )
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "XSAMCallback cannot measure a model sharded by FSDP: use hf_xsam.sharpness.top_eigenpair."
            )
        refuse_measuring(trainer)
        if find_spec("scipy") is None:
            raise ImportError("XSAMCallback needs scipy: pip install 'hf_xsam[tools]'")
        assert isinstance(trainer.model, nn.Module)
        settings = MeasureSettings(rhos=[0.05], trace_samples=0) if settings is None else settings
        parameters_in_scope(trainer.model, settings.eigen_scope, "eigen_scope")  # refused now, not at each measurement
        self._trainer, self._every, self._samples, self._data = trainer, every, samples, data
        # Slices cannot be logged, and `measure`'s defaults have 42 losses for them.
        self._settings = replace(settings, slice_points=0)
        self._batches: list[Any] | None = None
        self._measured_at: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time; a measurement after the last step is in the checkpoint that is saved then."""
        step = state.global_step
        if step >= state.max_steps or (self._every is not None and step % self._every == 0):
            self._measure_and_log()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the final model, unless it is the one that was measured after the last step."""
        if self._measured_at != state.global_step or args.load_best_model_at_end:
            self._measure_and_log()
        self._measured_at = None  # a second training may end at the same step

    def _measure_and_log(self) -> None:
        trainer = self._trainer
        self._measured_at = trainer.state.global_step
        try:
            found = self.measure()
        except Exception as error:  # a measurement may not end a training
            logger.warning("Sharpness was not measured at step %d: %r", trainer.state.global_step, error)
            return
        metrics = {
            "loss": found.loss,
            "gradient_norm": found.gradient_norm,
            "top_eigenvalue": found.eigenvalues[0],
            "gradient_angle_degrees": found.gradient_angles_degrees[0],
        }
        for rho, rise in found.sam_sharpness.items():
            metrics["sam_sharpness" if len(found.sam_sharpness) == 1 else f"sam_sharpness_{rho:g}"] = rise
        if found.trace is not None:
            metrics["trace"] = found.trace.mean
        # The stock method: subclasses add to each log what they have collected since the last, and start over. It
        # also takes the step's own log as done.
        control, should_log = trainer.control, trainer.control.should_log
        Trainer.log(trainer, {f"sharpness/{name}": value for name, value in metrics.items()})
        control.should_log = should_log

    def measure(self) -> Sharpness:
        """Return the sharpness of the trainer's loss on the callback's examples, at the model's current weights."""
        trainer = self._trainer
        if self._batches is None:
            self._batches = choose_batches(trainer, self._data, self._samples, self._settings.seed)

        def compute_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
            before.restore()  # a batch's loss depends on the weights alone
            loss = trainer.compute_loss(model, copied(batch))
            assert isinstance(loss, Tensor)  # a tuple only with return_outputs
            return loss

        assert isinstance(trainer.model, nn.Module)
        with logs_dropped(trainer), Surroundings(trainer.model, trainer.args.device, trainer).undone() as before:
            return measure(
                trainer.model,
                self._batches,
                self._settings,
                compute_loss=compute_loss,
                progress=False,
                accelerator=trainer.accelerator,
            )


def choose_batches(trainer: Trainer, dataset: Any, samples: int, seed: int) -> list[Any]:
    """Return a random choice of examples, collated as for training; the same seed chooses the same examples.

    The random generators stay as they are.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    size = trainer.args.per_device_train_batch_size
    random_state = RandomState.capture()
    random.seed(seed), np.random.seed(seed), torch.default_generator.manual_seed(seed)  # for masks that collators draw
    try:
        examples = [dataset[number] for number in chosen]
        return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]
    finally:
        random_state.restore()

"""One run: train a task in a mode, then measure the model, and return the record that is kept of it."""

import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from damage import scores_after_damage
from modes import LONG, MODES, RandomDirectionTrainer
from tasks import TASKS, Prepared, Task
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from watching import Watch, collated, scores_of

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.sharpness import MeasureSettings, measure

WATCHED = ("validation", "test")  # the splits that a watched task is scored on after each epoch
SWEPT = ("test", "elsewhere")  # the splits that a sweep is scored on before training and after it
GRID = ("tuning", "sweep")  # the parts whose runs of a mode and seed differ in learning rate or rho
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "scikit-learn", "scipy", "numpy")


@dataclass(frozen=True)
class Job:
    """One run, and the settings that are its own.

    Attributes:
        task: a key of `TASKS`.
        part: "fixed", the task's own learning rate and rho; "tuning", one point of the grid; "tuned", the best one;
            "sweep", one point of a grid that is reported.
        mode: one of `ALL_MODES`.
        seed: of the run.
        learning_rate, rho: rho is None for the stock optimizer.
        epochs: to train for, where "_long" modes have more.
    """

    task: str
    part: str
    mode: str
    seed: int
    learning_rate: float
    rho: float | None
    epochs: float

    def __str__(self) -> str:
        grid = f", learning rate {self.learning_rate:g}" + ("" if self.rho is None else f", rho {self.rho:g}")
        return f"{self.task}, {self.part}, {self.mode}, seed {self.seed}" + grid * (self.part in GRID)

    @property
    def key(self) -> str:
        """Return what the run's record is found by among its task's."""
        rho = "" if self.rho is None else f"_rho{self.rho:g}"
        name = f"lr{self.learning_rate:g}{rho}_seed{self.seed}" if self.part in GRID else str(self.seed)
        return f"{self.part}/{self.mode}/{name}"

    def xsam_config(self) -> XSAMConfig | None:
        """Return X-SAM's settings: the library's defaults but for the task's and the mode's."""
        fields = MODES[self.mode.removesuffix(LONG)].xsam
        settings = {"rho": self.rho, "replay_check": "never", **TASKS[self.task].xsam}
        return None if fields is None else XSAMConfig(**{**settings, **fields})

    def settings(self) -> dict[str, Any]:
        """Return all that decides the run's outcome besides its seed, as JSON gives it back."""
        config = self.xsam_config()
        xsam = None
        if config is not None:
            fields = config.to_dict()
            ignored = {"log_metrics", "replay_check"}  # which change no result
            if not (config.needs_eigenvector or config.takes_one_pass):  # SAM
                ignored |= {name for name in fields if name.startswith("eigen_")}
            # Fields that came after the first results: none of their defaults changes a step.
            later = {"perturbation": "gradient", "start_step": 0}
            xsam = {name: x for name, x in fields.items() if name not in ignored and later.get(name, ...) != x}
            if MODES[self.mode.removesuffix(LONG)].random:
                xsam["direction"] = "random"
        return {
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "arguments": dict(TASKS[self.task].arguments),
            "xsam": xsam,
        }

    def run(self) -> dict[str, Any]:
        """Train and measure, on one thread; return the record: settings, versions, metrics and cost.

        Losses and metrics are measured in evaluation mode, the training loss on the task's sample of training examples
        with the labels that were trained on. `test` is left out where the run is there for tuning. A sweep has `test`
        and `elsewhere` alone, and both of them `before` training.
        """
        torch.set_num_threads(1)
        task, began = TASKS[self.task], time.monotonic()
        prepared = task.prepare(self.seed)
        with TemporaryDirectory() as folder:
            trainer = build_trainer(self, prepared, training_arguments(self, folder))
            watched = task.watched and self.part != "tuning"
            sets = {name: collated(trainer, prepared.splits[name]) for name in WATCHED if watched}
            before = scored(trainer, prepared, task, SWEPT if self.part == "sweep" else ())
            watch = Watch(sets, prepared.wrong_labels)
            trainer.add_callback(watch)
            forward_passes = ForwardPasses(prepared.model)
            start, cpu_start = time.monotonic(), time.process_time()
            trainer.train()
            cost = {
                "train_seconds": time.monotonic() - start - watch.seconds,
                "train_cpu_seconds": time.process_time() - cpu_start - watch.cpu_seconds,
                "steps": trainer.state.global_step,
                "forward_passes": forward_passes.stop() - watch.forward_passes,
            }
            after = {"sweep": SWEPT, "tuning": ("validation",)}.get(self.part, ("validation", "test"))
            metrics: dict[str, Any] = scored(trainer, prepared, task, after)
            if self.part == "sweep":
                metrics["before"] = before
            elif self.part != "tuning":
                sample = first(prepared.splits["train"], task.train_sample)
                metrics |= {"train": evaluate(trainer, sample, task)}
                metrics["loss_gap"] = metrics["test"]["loss"] - metrics["train"]["loss"]
                metrics["top_eigenvalue"] = top_eigenvalue(trainer, task)
            if watched:
                metrics["test"]["ece"] = scores_of(prepared.model, sets["test"])["ece"]
                metrics["epochs"] = watch.curves
                metrics["damage"] = scores_after_damage(prepared.model, sets["test"], self.seed)
                if "elsewhere" in prepared.splits:
                    batches = collated(trainer, prepared.splits["elsewhere"])
                    metrics["elsewhere"] = scores_of(prepared.model, batches)
        return {
            "task": self.task,
            "part": self.part,
            "mode": self.mode,
            "seed": self.seed,
            "settings": self.settings(),
            "metrics": metrics,
            "cost": cost | {"total_seconds": time.monotonic() - began},
            **provenance(),
        }


def training_arguments(job: Job, folder: str, **overrides: Any) -> TrainingArguments:
    """Return the task's arguments with the job's own, on one CPU, saving and reporting nothing."""
    settings = {
        **TASKS[job.task].arguments,
        "num_train_epochs": job.epochs,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
        "output_dir": folder,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **overrides})


def build_trainer(job: Job, prepared: Prepared, args: TrainingArguments, **settings: Any) -> Trainer:
    """Return the trainer of the job's mode on the prepared model and data."""
    task, config = TASKS[job.task], job.xsam_config()
    settings |= {"model": prepared.model, "args": args, "train_dataset": prepared.splits["train"]}
    settings |= prepared.settings
    kind = RandomDirectionTrainer if MODES[job.mode.removesuffix(LONG)].random else XSAMTrainer
    trainer = Trainer(**settings) if config is None else kind(xsam_config=config, **settings)
    if task.mean_loss:
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return trainer


class ForwardPasses:
    """Counts the model's forward passes, whoever asks for them."""

    def __init__(self, model: torch.nn.Module) -> None:
        passes = self._passes = list[None]()
        # A function of its own: what a hook's object holds is put back after the passes that X-SAM adds.
        self._handle = model.register_forward_pre_hook(lambda *_: passes.append(None))

    def stop(self) -> int:
        """Stop counting and return the number."""
        self._handle.remove()
        return len(self._passes)


class StepGauge(TrainerCallback):
    """Reads a gauge, such as a clock, at the end of each optimizer step."""

    def __init__(self, gauge: Callable[[], float]) -> None:
        self.gauge = gauge
        self.values: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read it."""
        self.values.append(self.gauge())


def top_eigenvalue(trainer: Trainer, task: Task) -> float:
    """Return the top eigenvalue of the training loss, in evaluation mode, on the task's fixed sample, as one batch.

    The measure is the same whatever trained the model: of all trainable weights, by Lanczos from its gradient and one
    random vector. It is nan where there is none to be found, for a run that diverged.
    """
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(task.curvature_sample)])
    # The eigenvalue's error is of the order of the residual's square: within 0.01% wherever it was compared.
    settings = MeasureSettings(hvp=task.curvature_hvp, tolerance=0.01, trace_samples=0, rhos=[], slice_points=0)
    try:
        found = measure(trainer.model, [batch], settings, progress=False)
    except ArithmeticError:
        return math.nan
    return found.eigenvalues[0]


def first(examples: Any, count: int) -> Any:
    """Return the first `count` examples of a list or a data set, or all of fewer."""
    return examples[:count] if isinstance(examples, list) else examples.select(range(min(count, len(examples))))


def evaluate(trainer: Trainer, examples: Any, task: Task) -> dict[str, float]:
    """Return loss and the task's metric on `examples`."""
    found = trainer.evaluate(examples)
    return {"loss": found["eval_loss"], task.metric: found[f"eval_{task.metric}"]}


def scored(trainer: Trainer, prepared: Prepared, task: Task, splits: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return loss and the task's metric on each of the splits named."""
    return {name: evaluate(trainer, prepared.splits[name], task) for name in splits}


def provenance() -> dict[str, Any]:
    """Return the versions, the commit of the checkout, whether it had changes, and the processor."""
    git = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], **git).stdout.strip()
    changes = subprocess.run(["git", "status", "--porcelain", "--", "*.py"], **git).stdout.strip()
    return {
        "commit": commit + ("-modified" if changes else ""),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "processor": platform.processor() or platform.machine(),
    }

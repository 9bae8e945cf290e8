"""What an optimizer step costs in the stock Trainer, SAM and X-SAM: the budget of the equal-cost comparison.

Seconds on a shared machine vary with what else runs on it. So the ratios are measured once, in turns and in CPU time,
kept in a file, and decide how many epochs the "_long" modes train.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tasks import TASKS
from torch.utils.flop_counter import FlopCounterMode
from training import LONG, Job, StepClock, build_trainer, provenance, training_arguments

from hf_xsam import XSAMConfig

MEASURED = ("stock", "sam", "paper")  # the other corrections cost what the paper's does
ROUNDS = 3


def measured_steps() -> tuple[int, int]:
    """Return how many steps go before the measured ones, and how many of those there are: whole refresh intervals."""
    interval = XSAMConfig().eigen_interval
    return interval, interval * math.ceil(10 / interval)


def cpu_seconds_per_step(job: Job) -> float:
    """Return the mean CPU time of an optimizer step."""
    skipped, steps = measured_steps()
    clock = StepClock()
    _train(job, skipped + steps, callbacks=[clock])
    return (clock.seconds[-1] - clock.seconds[-1 - steps]) / steps


def operations(job: Job) -> int:
    """Return the floating point operations, of matrix products and convolutions, of as many steps as are measured."""
    counter = FlopCounterMode(display=False)
    with counter:
        _train(job, measured_steps()[1])
    return counter.get_total_flops()


def _train(job: Job, steps: int, **settings: Any) -> None:
    prepared = TASKS[job.task].prepare(job.seed)
    with TemporaryDirectory() as folder:
        build_trainer(job, prepared, training_arguments(job, folder, max_steps=steps), **settings).train()


def long_epochs(epochs: float, mode: str, cost: dict[str, Any]) -> float:
    """Return for how many epochs `mode` costs what X-SAM costs for `epochs`: epochs * cost(X-SAM) / cost(mode)."""
    relative = cost["relative_cpu_seconds"]
    return round(epochs * relative["paper"] / relative[mode.removesuffix(LONG)], 2)


@dataclass(frozen=True)
class CostJob:
    """Measures a task's steps."""

    task: str
    mode: str = "cost of a step"

    def __str__(self) -> str:
        return f"{self.task}, {self.mode}"

    def path(self, results: Path) -> Path:
        """Return the result file's place."""
        return results / self.task / "cost.json"

    def jobs(self) -> dict[str, Job]:
        """Return a run of each mode that is measured."""
        task = TASKS[self.task]
        return {
            mode: Job(self.task, "fixed", mode, 0, task.learning_rate, None if mode == "stock" else task.rho, 1.0)
            for mode in MEASURED
        }

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome, besides the machine."""
        return {mode: job.settings() for mode, job in self.jobs().items()}

    def run(self) -> dict[str, Any]:
        """Return the least of three CPU times of each mode, taken in turns, and both costs relative to the stock's."""
        torch.set_num_threads(1)
        jobs = self.jobs()
        rounds = [{mode: cpu_seconds_per_step(job) for mode, job in jobs.items()} for _ in range(ROUNDS)]
        seconds = {mode: min(times[mode] for times in rounds) for mode in MEASURED}
        counted = {mode: operations(job) for mode, job in jobs.items()}
        return {
            "task": self.task,
            "settings": self.settings(),
            "cpu_seconds_per_step": seconds,
            "relative_cpu_seconds": {mode: seconds[mode] / seconds["stock"] for mode in MEASURED},
            # One forward and backward pass of the stock Trainer is 1.
            "forward_backward_per_step": {mode: counted[mode] / counted["stock"] for mode in MEASURED},
            **provenance(),
        }

"""What an optimizer step costs in the stock Trainer, SAM and X-SAM: the budget of the equal-cost comparison.

Seconds on a shared machine vary with what else runs on it. So the ratios are measured once, in turns and in CPU time,
kept with the results, and decide how many epochs the "_long" modes train.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from modes import LONG
from schedule import refresh_steps
from tasks import TASKS
from torch.utils.flop_counter import FlopCounterMode
from training import Job, StepGauge, build_trainer, provenance, training_arguments

MEASURED = ("stock", "sam", "paper")  # the other corrections cost what the paper's does
ROUNDS = 3
SKIPPED, STEPS = 10, 20  # of a measured run: what is not counted, and what is, a few refreshes among it


def cost_of_a_step(job: Job, gauge: Callable[[], float]) -> float:
    """Return by how much `gauge` rises in an optimizer step, as a mean over all steps of the job's run.

    A few of its steps are run. Those that refresh the eigenvector cost more, and are weighted by how many the whole run
    has.
    """
    readings = StepGauge(gauge)
    prepared = TASKS[job.task].prepare(job.seed)
    with TemporaryDirectory() as folder:
        arguments = training_arguments(job, folder, max_steps=SKIPPED + STEPS)
        trainer = build_trainer(job, prepared, arguments, callbacks=[readings])
        trainer.train()
    run = round(job.epochs * len(trainer.get_train_dataloader()))
    config = job.xsam_config()
    # A short run's task is measured past its end.
    refreshed = refresh_steps(config, max(run, SKIPPED + STEPS)) if config else []
    costs: dict[bool, list[float]] = {True: [], False: []}
    for step in range(SKIPPED, SKIPPED + STEPS):
        costs[step in refreshed].append(readings.values[step] - readings.values[step - 1])
    plain = fmean(costs[False])
    share = sum(step < run for step in refreshed) / run
    return plain + share * (fmean(costs[True]) - plain) if refreshed else plain


def cpu_seconds_per_step(job: Job) -> float:
    """Return the mean CPU time of an optimizer step."""
    return cost_of_a_step(job, time.process_time)


def operations(job: Job) -> float:
    """Return the mean floating point operations of an optimizer step, of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        return cost_of_a_step(job, counter.get_total_flops)


def long_epochs(epochs: float, mode: str, cost: dict[str, Any]) -> float:
    """Return for how many epochs `mode` costs what X-SAM costs for `epochs`: epochs * cost(X-SAM) / cost(mode)."""
    relative = cost["relative_cpu_seconds"]
    return round(epochs * relative["paper"] / relative[mode.removesuffix(LONG)], 2)


@dataclass(frozen=True)
class CostJob:
    """Measures a task's steps."""

    task: str
    mode: str = "cost of a step"
    key: str = "cost"  # what its record is found by among the task's

    def __str__(self) -> str:
        return f"{self.task}, {self.mode}"

    def jobs(self) -> dict[str, Job]:
        """Return a run of each mode that is measured."""
        task = TASKS[self.task]
        rate, rho, epochs = task.learning_rate, task.rho, task.arguments["num_train_epochs"]
        return {
            mode: Job(self.task, "fixed", mode, 0, rate, None if mode == "stock" else rho, epochs) for mode in MEASURED
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

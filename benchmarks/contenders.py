"""Who is timed: trainers, and a hand-written loop around another library's SAM."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from workload import Workload

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.step.sharpness_aware import SharpnessAwareSteps


def clock() -> float:
    """Return seconds: wall-clock once an accelerator has finished its work, else this process's processor time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class StepTimes(TrainerCallback):
    """Notes the seconds from the beginning of each optimizer step to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock: the step's batch has been collated."""
        self.began = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(clock() - self.began)


class TrainerContender:
    """A trainer whose `train` is called again and again."""

    def __init__(self, make: Callable[..., Trainer], workload: Workload, output_dir: str, steps: int) -> None:
        self.trainer = make(**workload.settings(output_dir, steps))
        self.times = StepTimes()
        self.trainer.add_callback(self.times)

    def block(self) -> list[float]:
        """Train anew for the block's steps; return the seconds of each."""
        self.times.seconds = []
        self.trainer.train()
        return self.times.seconds


class HandWrittenSAM:
    """pytorch_optimizer's SAM in a loop of one's own."""

    def __init__(self, workload: Workload, output_dir: str, steps: int) -> None:
        from pytorch_optimizer import SAM  # which no other contender needs

        settings = workload.settings(output_dir, steps)
        self.trainer = Trainer(**settings)  # for its batches and its optimizer's class and settings
        self.steps, self.model = steps, self.trainer.model
        base, options = Trainer.get_optimizer_cls_and_kwargs(self.trainer.args, self.model)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = SAM(parameters, base, rho=workload.rho, **options)

    def block(self) -> list[float]:
        """Train for the block's steps; return the seconds of each."""
        seconds = []
        self.model.train()
        for batch, _ in zip(self._batches(), range(self.steps), strict=False):
            began = clock()
            self._loss(batch).backward()
            self.optimizer.first_step(zero_grad=True)
            self._loss(batch).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
            self.optimizer.second_step(zero_grad=True)
            seconds.append(clock() - began)
        return seconds

    def _batches(self) -> Iterator[dict]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def _loss(self, batch: dict) -> torch.Tensor:
        batch = {name: value.to(self.trainer.args.device) for name, value in batch.items()}
        return self.model(**batch)["loss"]


class SteadyXSAMTrainer(XSAMTrainer):
    """Does once what is done once in a training, and not in each block, which is a training of its own."""

    before: SharpnessAwareSteps | None = None

    def _begin_steps(self) -> SharpnessAwareSteps:
        steps = super()._begin_steps()
        if self.before is not None:
            for name in ("method", "_rows_add_up", "_checked"):
                setattr(steps, name, getattr(self.before, name))
        self.before = steps
        return steps


def xsam(config: XSAMConfig) -> Callable[..., XSAMTrainer]:
    """Return what makes a trainer with `config`."""
    return lambda **settings: SteadyXSAMTrainer(**settings, xsam_config=config)


ONE_PASS_RHO, RANDOM_RHO = 5.0, 40.0  # times SAM's
LATE = 0.7  # the share of a training that is the stock Trainer's, where X-SAM begins late


Contender = TrainerContender | HandWrittenSAM


def steady(make: Callable[..., XSAMConfig], rho: float, **settings: Any) -> XSAMConfig:
    """Return settings as they are once the first refreshes are over: each block begins a training anew."""
    return make(rho=rho, eigen_start_step=0, eigen_warmup_steps=0, **settings)


def contenders(rho: float, **settings: Any) -> dict[str, Callable[..., Contender]]:
    """Return `trainers`, and beside them another library's SAM."""
    return {**trainers(rho, **settings), "pytorch_optimizer's SAM": HandWrittenSAM}


def trainers(rho: float, **settings: Any) -> dict[str, Callable[..., TrainerContender]]:
    """Return by name what makes a contender from a workload, an output folder and a number of steps.

    Args:
        rho: of all of them.
        **settings: fields of `XSAMConfig` for the contenders that have an eigenvector.
    """

    def trainer(make: Callable[..., Trainer]) -> Callable[..., TrainerContender]:
        return lambda *arguments: TrainerContender(make, *arguments)

    by_difference, at_random = {**settings, "hvp": "finite_difference"}, {**settings, "perturbation": "random"}
    return {
        "stock Trainer": trainer(Trainer),
        "SAM": trainer(xsam(XSAMConfig(rho=rho, alpha=0.0))),
        "X-SAM": trainer(xsam(steady(XSAMConfig, rho, **settings))),
        "X-SAM, authors' policy": trainer(xsam(steady(XSAMConfig.paper, rho, **settings))),
        "X-SAM, the last 30%": trainer(xsam(steady(XSAMConfig, rho, start_step=LATE, **settings))),
        "one pass": trainer(xsam(steady(XSAMConfig.one_pass, ONE_PASS_RHO * rho, **settings))),
        "one pass, differences": trainer(xsam(steady(XSAMConfig.one_pass, ONE_PASS_RHO * rho, **by_difference))),
        "one pass, random": trainer(xsam(steady(XSAMConfig.one_pass, RANDOM_RHO * rho, **at_random))),
    }

"""Short runs that something goes wrong in, and what must be right afterwards."""

import math
import random
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import TrainerCallback

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.saving.checkpoint import last_complete_checkpoint
from tests.helpers import arguments, examples_of, weights_of

STEPS = 6
EXAMPLES, FEATURES, CLASSES = 48, 5, 3


class Fault(Exception):
    """What a fault of kind "exception" raises."""


COUNTS: list[SimpleNamespace] = []  # of each model; what an attribute holds would be put back


class FaultyModel(nn.Module):
    """A small network with dropout and batch norm; the forward calls in `faulty` go wrong as `kind` says."""

    def __init__(self, kind=None, faulty=()):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(7, CLASSES)
        self.kind, self.faulty = kind, set(faulty)
        self.counted_as = len(COUNTS)
        COUNTS.append(SimpleNamespace(calls=0, fired=0))

    @property
    def count(self):
        return COUNTS[self.counted_as]

    def forward(self, x, labels):
        counted = torch.is_grad_enabled()  # not the passes that only evaluate
        faulty = counted and self.count.calls in self.faulty
        self.count.calls += counted
        self.count.fired += faulty
        if faulty and self.kind in ("exception", "interrupt"):
            raise Fault if self.kind == "exception" else KeyboardInterrupt
        features = self.body(x)
        if faulty and self.kind == "gradient":
            features.register_hook(lambda gradient: gradient * math.nan)
        loss = nn.functional.cross_entropy(self.head(features), labels)
        factors = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
        return {"loss": loss * factors[self.kind] if faulty and self.kind in factors else loss}


@dataclass
class Run:
    """The settings of a run, drawn at random."""

    xsam: dict
    accumulation: int
    optimizer: str
    scaler: bool
    seed: int

    @classmethod
    def draw(cls, seed, scaler=None):
        draw = random.Random(seed)
        return cls(
            xsam={
                "rho": draw.choice([0.05, 0.5]),
                "alpha": draw.choice([0.0, 0.5, 1.0]),
                "correction": draw.choice(["paper", "projection", "aligned"]),
                "hvp": draw.choice(["exact", "finite_difference"]),
                "normalize_gradient": draw.random() < 0.5,
                "eigen_interval": draw.choice([1, 2, 3]),
                "power_iterations": draw.choice([1, 2]),
            },
            accumulation=draw.choice([1, 2]),
            optimizer=draw.choice(["SGD", "AdamW"]),
            scaler=draw.random() < 0.3 if scaler is None else scaler,
            seed=seed,
        )

    def trainer(self, folder, model=None, callbacks=(), trainer_class=None, **overrides):
        class Scaled(XSAMTrainer):
            def create_optimizer(self, *args, **kwargs):
                # Accelerate refuses fp16 on the CPU; the scaler's arithmetic is the real one.
                self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
                return super().create_optimizer(*args, **kwargs)

        generator = torch.Generator().manual_seed(self.seed)
        batch = {
            "x": torch.randn(EXAMPLES, FEATURES, generator=generator),
            "labels": torch.randint(CLASSES, (EXAMPLES,), generator=generator),
        }
        settings = {"lr": 0.05, "momentum": 0.9} if self.optimizer == "SGD" else {"lr": 0.01}
        trainer_class = trainer_class or (Scaled if self.scaler else XSAMTrainer)
        return trainer_class(
            model=model or FaultyModel(),
            args=arguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=EXAMPLES // STEPS // self.accumulation,
                gradient_accumulation_steps=self.accumulation,
                **{"save_strategy": "steps", "save_steps": 1, **overrides},
            ),
            train_dataset=examples_of(batch),
            **({"xsam_config": XSAMConfig(**self.xsam)} if issubclass(trainer_class, XSAMTrainer) else {}),
            optimizer_cls_and_kwargs=(getattr(torch.optim, self.optimizer), settings),
            callbacks=list(callbacks),
        )


def outcome(trainer):
    """Return all that a run leaves behind: weights, buffers, optimizer state, v and the counters."""
    state = trainer.xsam_state
    return {
        "model": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": optimizer_tensors(trainer),
        "eigenvector": state.eigenvector,
        "numbers": [
            None if state.eigenvalue is None else state.eigenvalue.item(),
            None if state.spectrum is None else [part.item() for part in state.spectrum],
            state.step,
            state.refreshed_at,
            trainer.state.global_step,
        ],
    }


def optimizer_tensors(trainer):
    """Return the optimizer's state as a list of tensors, in the order of the parameters."""
    states = trainer.optimizer.state_dict()["state"]
    return [
        torch.as_tensor(value).clone()
        for number in sorted(states)
        for _, value in sorted(states[number].items())
        if value is not None
    ]


def same(left, right):
    """Return whether two outcomes are equal bit for bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@dataclass
class Inspector(TrainerCallback):
    """Looks at every step of a run; `wrong` lists what was not right."""

    trainer: XSAMTrainer = None
    wrong: list = field(default_factory=list)
    last_faulty_step: int = 0
    before: dict = None

    def check(self, right, what, step):
        if not right:
            self.wrong.append(f"step {step}: {what}")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {
            "weights": weights_of(model),
            "optimizer": optimizer_tensors(self.trainer),
            "eigenvector": self.trainer.xsam_state.eigenvector,
            "refreshed_at": self.trainer.xsam_state.refreshed_at,
            "fired": model.count.fired,
            "skipped": self.trainer.xsam_state.skipped_steps,
            "scale": self.trainer.accelerator.scaler and self.trainer.accelerator.scaler.get_scale(),
        }

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.check(torch.equal(weights_of(model), self.before["weights"]), "weights not restored", state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step, trainer, before = state.global_step, self.trainer, self.before
        vector = trainer.xsam_state.eigenvector
        tensors = [weights_of(model), *optimizer_tensors(trainer), *(vector or {}).values()]
        self.check(all(torch.isfinite(tensor).all() for tensor in tensors), "not finite", step)
        if vector is not None:
            length = torch.stack([part.norm() for part in vector.values()]).norm().item()
            self.check(abs(length - 1) < 1e-4, f"v has norm {length}", step)
        fired = model.count.fired > before["fired"]
        skipped = trainer.xsam_state.skipped_steps - before["skipped"]
        self.last_faulty_step = step if fired else self.last_faulty_step
        self.check(skipped <= fired, "skipped without a fault", step)
        unmoved = torch.equal(weights_of(model), before["weights"])
        if skipped and trainer.accelerator.scaler is not None:
            untouched = unmoved and same(optimizer_tensors(trainer), before["optimizer"])
            self.check(untouched, "the scaler did not skip", step)
            self.check(trainer.accelerator.scaler.get_scale() == before["scale"] / 2, "scale not lowered", step)
        if trainer.xsam_state.refreshed_at == before["refreshed_at"]:
            self.check(same(vector, before["eigenvector"]), "v changed without a refresh", step)
        self.check(fired or not unmoved, "no step", step)


def newest_checkpoint(folder):
    """Return what to resume from: the newest complete checkpoint, or None where there is none yet."""
    with suppress(ValueError):
        return last_complete_checkpoint(str(folder))
    return None


def train_in_subprocess(run, folder, output, started):
    """Train, from the newest complete checkpoint in `folder` where there is one, and save the outcome."""
    trainer = run.trainer(folder)
    started.set()
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    partial = Path(output).with_suffix(".partial")
    torch.save(outcome(trainer), partial)
    partial.rename(output)


def run_with_fault(run, kind, faulty, folder):
    """Train with a fault; return the trainer and its inspector."""
    model, inspector = FaultyModel(kind, faulty), Inspector()
    trainer = run.trainer(folder, model, [inspector])
    inspector.trainer = trainer
    with suppress(Fault, KeyboardInterrupt):
        trainer.train()
    return trainer, inspector

"""A step that is run again is the same step, whatever it changes beside gradients: with rho 0 it is the stock run."""

import random
from collections import deque
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_xsam import XSAMConfig, XSAMTrainerMixin
from tests.helpers import PLAIN, WeightRecorder, logs_of, run, weights_of
from tests.models import SIZES, Smooth, points


class Clamped(Smooth):
    """Assigns the data of a weight, as CLIP does with its logit scale."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x, labels):
        self.scale.data = torch.clamp(self.scale.data, 0, 1.6)
        return super().forward(x * self.scale, labels)


class Clipped(Smooth):
    """Clips its weights in place, as Wasserstein critics do."""

    def forward(self, x, labels):
        for parameter in self.layers.parameters():
            parameter.data.clamp_(-0.4, 0.4)
        return super().forward(x, labels)


class Counting(Smooth):
    """Has plain attributes of all kinds that change from pass to pass, and that its output depends on."""

    def __init__(self):
        super().__init__()
        self.calls, self.ratio, self.history = 0, 1.0, []
        self.recent, self.seen = deque([0.0], maxlen=3), {"count": 0, "rows": [1.0]}
        self.array, self.tensor = np.ones(6, dtype=np.float32), torch.ones(6)

    def forward(self, x, labels):
        self.calls += 1
        self.ratio *= 0.9
        self.history.append(self.calls)
        self.recent.append(float(self.calls))
        self.seen["count"] += 1
        self.seen["rows"].append(0.5)
        self.array *= 0.95
        self.tensor.mul_(0.98)
        factor = self.ratio + 0.01 * len(self.history) + 0.01 * sum(self.recent) + 0.01 * self.seen["count"]
        return super().forward(x * factor * torch.from_numpy(self.array) * self.tensor, labels)


class Observing(Smooth):
    """Has buffers that are None or empty at first, are resized, replaced, made in inference mode, or added."""

    def __init__(self):
        super().__init__()
        self.register_buffer("later", None)
        self.register_buffer("largest", torch.tensor([]))
        self.register_buffer("inferred", torch.zeros(6))

    def forward(self, x, labels):
        self.later = x.mean(0) if self.later is None else 0.9 * self.later + 0.1 * x.mean(0)
        if self.largest.numel() == 0:
            self.largest.resize_(6).fill_(1.0)
        self.largest.copy_(torch.maximum(self.largest, x.abs().amax(0)))
        with torch.inference_mode():
            self.inferred = self.inferred + 0.1
        if "added" not in self._buffers:
            self.register_buffer("added", torch.ones(6))
        self.added.mul_(0.9)
        return super().forward((x - self.later) / self.largest * self.added + self.inferred.clone(), labels)


class MomentumEncoder(Smooth):
    """Has a teacher that begins as the student and follows it, by assignment or in place."""

    def __init__(self, how):
        super().__init__()
        self.how, self.teacher = how, deepcopy(self.layers).requires_grad_(False)

    def forward(self, x, labels):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.layers.parameters(), strict=True):
                if self.how == "assigned":
                    slow.data = slow.data * 0.9 + fast.data * 0.1
                elif self.how == "in place":
                    slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
                else:
                    slow.lerp_(fast, 0.1)
            target = self.teacher(x)
        return {"loss": super().forward(x, labels)["loss"] + (self.layers(x) - target).square().mean()}


class Noisy(Smooth):
    """Draws from a generator of its own."""

    def __init__(self, kind):
        super().__init__()
        makers = {"numpy": np.random.default_rng, "legacy": np.random.RandomState, "python": random.Random}
        makers["torch"] = lambda seed: torch.Generator().manual_seed(seed)
        self.generator = makers[kind](3)

    def forward(self, x, labels):
        if isinstance(self.generator, torch.Generator):
            noise = torch.rand(6, generator=self.generator)
        elif isinstance(self.generator, random.Random):
            noise = torch.tensor([self.generator.random() for _ in range(6)])
        else:
            noise = torch.from_numpy(self.generator.normal(size=6)).float()
        return super().forward(x + noise, labels)


GLOBAL = np.random.default_rng(5)


class Mixing(Trainer):
    """Draws from generators in a closure, in a global variable and in a helper object; counts its calls."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        closed, self.calls, self.helper = np.random.default_rng(7), 0, Helper()
        self.draw = lambda: float(closed.random())

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        inputs = {**inputs, "x": inputs["x"] * (1 + self.draw() + self.helper.generator.random()) + GLOBAL.random()}
        return super().compute_loss(model, inputs, *args, **kwargs) * (1 + 0.1 * (self.calls % 5))


class Helper:
    def __init__(self):
        self.generator = random.Random(9)


def with_xsam(kind):
    return type(kind.__name__, (XSAMTrainerMixin, kind), {})


def state_of(trainer):
    """Return what the run has left: weights, buffers and attributes of modules, and what its generators draw next."""
    model, found = trainer.model, {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = value.detach().clone()
    for name in ("calls", "ratio", "history", "recent", "seen", "array", "tensor"):
        if hasattr(model, name):
            found[f"attribute {name}"] = deepcopy(getattr(model, name))
    if hasattr(model, "generator"):
        generator = model.generator
        torch_generator = isinstance(generator, torch.Generator)
        found["draw"] = torch.rand(3, generator=generator) if torch_generator else generator.random()
    if isinstance(trainer, Mixing):
        found |= {"calls": trainer.calls, "draws": (trainer.draw(), trainer.helper.generator.random())}
    return found


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one == other


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (Clamped, Trainer),
        (Clipped, Trainer),
        (Counting, Trainer),
        (Observing, Trainer),
        *((lambda how=how: MomentumEncoder(how), Trainer) for how in ("assigned", "in place", "lerp")),
        *((lambda kind=kind: Noisy(kind), Trainer) for kind in ("numpy", "legacy", "python", "torch")),
        (Smooth, Mixing),
    ],
    ids=[
        *("clamped", "clipped", "counting", "observing", "assigned", "in-place", "lerp"),
        *("numpy", "legacy", "python", "torch", "mixing"),
    ],
)
def test_without_perturbation_it_is_the_stock_run(build, kind, accumulation, tmp_path, caplog):
    global GLOBAL
    arguments = {"gradient_accumulation_steps": accumulation, "logging_steps": 1}
    left = []
    for config in (None, XSAMConfig(**PLAIN, replay_check="every")):
        GLOBAL = np.random.default_rng(5)
        chosen = kind if config is None else with_xsam(kind)
        trainer = run(build(), points(40), tmp_path, config, chosen, **arguments)
        left.append(state_of(trainer))
    assert left[0].keys() == left[1].keys()
    assert [name for name in left[0] if not equal(left[0][name], left[1][name])] == []
    assert all(line["xsam/sharpness"] == 0.0 for line in logs_of(trainer))
    assert "run again at the same weights" not in caplog.text


@pytest.mark.parametrize("build", [Clamped, lambda: MomentumEncoder("in place"), Counting, Observing])
def test_a_perturbed_step_leaves_what_the_stock_step_does(build, tmp_path):
    """With learning rate 0."""
    settings = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.0})}
    recorder, left = WeightRecorder(), []
    for config in (None, XSAMConfig(rho=0.5)):
        model = build()
        kind = Trainer if config is None else with_xsam(Trainer)

        class Still(kind):
            def create_optimizer(self, *args, **kwargs):
                self.optimizer_cls_and_kwargs = settings["optimizer_cls_and_kwargs"]
                return super().create_optimizer(*args, **kwargs)

        trainer = run(model, points(16), tmp_path, config, Still, callbacks=[recorder])
        left.append(state_of(trainer))
    assert [name for name in left[0] if not equal(left[0][name], left[1][name])] == []


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_dynamic_rope(tmp_path, hvp):
    """Short, long and middle batches in turn: the frequencies depend on those before."""
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10.0}
    ids = torch.randint(5, 50, (24, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}

    class Cut(Trainer):
        def training_step(self, model, inputs, *args):
            length = (6, 40, 20)[self.state.global_step % 3]
            return super().training_step(model, {name: value[:, :length] for name, value in inputs.items()}, *args)

    cut_xsam = type("CutXSAM", (Cut, XSAMTrainerMixin, Trainer), {})

    def model():
        torch.manual_seed(0)
        sizes = {**SIZES, "max_position_embeddings": 8}
        return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5, rope_parameters=rope))

    stock = run(model(), batch, tmp_path, trainer_class=Cut)
    ours = run(model(), batch, tmp_path, XSAMConfig(**PLAIN), cut_xsam)
    assert torch.equal(weights_of(ours.model), weights_of(stock.model))
    settings = {"rho": 0.0, "alpha": 1e-9, "normalize_gradient": False, "eigen_batch_fraction": 1.0}
    runs = [run(model(), batch, tmp_path, XSAMConfig(hvp=kind, **settings), cut_xsam) for kind in ("exact", hvp)]
    exact, other = ([line["xsam/rayleigh_quotient"] for line in logs_of(trainer)] for trainer in runs)
    assert other == pytest.approx(exact, rel=0.05, abs=0.01)

"""Random small modules change attributes, buffers, frozen weights and generators in forward: each step is one step."""

import random
from collections import OrderedDict
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer

from hf_xsam import XSAMConfig, XSAMTrainer
from tests.helpers import PLAIN, logs_of, run
from tests.models import Smooth, points

BEHAVIOURS = [
    *("count", "list", "buffer", "assigned buffer", "teacher", "hidden teacher", "numpy", "torch", "dropout", "clamp"),
    *("normalized", "helper", "slots", "subclass", "nested", "cycle", "resized array", "resized buffer", "inference"),
    *("generator within", "hook", "closure", "spectral"),
]


class Drawn(Smooth):
    """Changes in forward what hypothesis has drawn."""

    def __init__(self, behaviours):
        super().__init__()
        self.behaviours, self.calls, self.items = behaviours, 0, [0.5]
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("grows", torch.zeros(0))
        self.register_buffer("inferred", torch.zeros(6))
        self.teacher, self.hidden = deepcopy(self.layers).requires_grad_(False), [deepcopy(self.layers)]
        self.numpy, self.torch = np.random.default_rng(1), torch.Generator().manual_seed(2)
        self.helper, self.slots, self.recorder = Helper(), Slots(), Recorder()
        self.subclass, self.array = Recent(), np.zeros(1)
        self.nested, self.cycle = {"a": [{"b": [random.Random(5), {"c": [0]}]}]}, {"count": 0}
        self.cycle["itself"] = self.cycle
        self.closure = counting_closure()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        if "hook" in behaviours:
            self.layers[0].register_forward_hook(self.recorder.note)

    def changed(self, behaviour, x):
        """Return `x`, changed by state that this call changes."""
        match behaviour:
            case "count":
                self.calls += 1
                return x * (1 + 0.01 * self.calls)
            case "list":
                self.items.append(self.items[-1] / 2)
                return x + sum(self.items)
            case "buffer":
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
                return x - self.mean
            case "assigned buffer":
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
                return x - self.mean
            case "teacher" | "hidden teacher":
                teacher = self.teacher if behaviour == "teacher" else self.hidden[0]
                for slow, fast in zip(teacher.parameters(), self.layers.parameters(), strict=True):
                    slow.data.lerp_(fast.data, 0.2)
                return x + teacher(x).mean().detach()
            case "numpy":
                return x + float(self.numpy.normal())
            case "torch":
                return x + torch.rand(6, generator=self.torch)
            case "dropout":
                return nn.functional.dropout(x, 0.3, self.training)
            case "clamp":
                self.layers[0].bias.data = self.layers[0].bias.data.clamp(-0.3, 0.3)
            case "normalized":
                self.layers[0].weight.data = nn.functional.normalize(self.layers[0].weight.data, dim=1)
            case "helper":
                self.helper.inner.count += 1
                return x * (1 + 0.01 * self.helper.inner.count * self.helper.generator.random())
            case "slots":
                self.slots.count += 1
                self.slots.array *= 0.9
                self.slots.later = getattr(self.slots, "later", 0) + 1
                return x + 0.01 * self.slots.count + float(self.slots.array.sum()) + 0.01 * self.slots.later
            case "subclass":
                self.subclass.note(len(self.subclass) + 0.1)
                return x + 0.01 * self.subclass.total + 0.1 * next(iter(self.subclass))
            case "nested":
                generator, counts = self.nested["a"][0]["b"]
                counts["c"].append(1)
                return x + generator.random() + 0.01 * len(counts["c"])
            case "cycle":
                self.cycle["itself"]["itself"]["count"] += 1
                return x * (1 + 0.01 * self.cycle["count"])
            case "resized array":
                self.array.resize(self.array.size + 1, refcheck=False)
                self.array[-1] = 0.1
                return x + float(self.array.sum())
            case "resized buffer":
                self.grows.resize_(self.grows.numel() + 1)[-1] = 0.1
                return x + self.grows.sum()
            case "inference":
                with torch.inference_mode():
                    self.inferred = self.inferred + 0.1
                return x + self.inferred.clone()
            case "generator within":
                return x + self.helper.generators["a"][0].random()
            case "closure":
                return x + 0.01 * self.closure()
            case "spectral":
                return self.spectral(x)
        return x

    def forward(self, x, labels):
        for behaviour in self.behaviours:
            x = self.changed(behaviour, x)
        return super().forward(x, labels)

    def state(self):
        """Return what forward may change, beside weights and buffers."""
        generators = self.numpy, self.helper.generator, self.helper.generators["a"][0], self.nested["a"][0]["b"][0]
        slots = self.slots.count, getattr(self.slots, "later", None)
        arrays = self.slots.array.tolist(), self.array.tolist(), [p.tolist() for p in self.hidden[0].parameters()]
        helpers = self.helper.inner.count, self.recorder.seen, self.recorder.count, self.closure()
        containers = self.items, [*self.subclass], self.subclass.total, self.nested["a"][0]["b"][1], self.cycle["count"]
        draws = [generator.random() for generator in generators], torch.rand(2, generator=self.torch).tolist()
        return deepcopy([self.calls, slots, arrays, helpers, containers, draws])


class Helper:
    def __init__(self, depth=1):
        self.generator, self.generators = random.Random(9), {"a": (np.random.default_rng(8),)}
        self.count, self.inner = 0, Helper(depth - 1) if depth else None


class Slots:
    __slots__ = ("array", "count", "later")

    def __init__(self):
        self.count, self.array = 0, np.ones(3)


class Recent(OrderedDict):
    """Keeps the last three, and an attribute of its own; its order matters."""

    total = 0.0

    def note(self, value):
        self[value] = None
        self.move_to_end(next(iter(self)))
        self.total += value
        while len(self) > 3:
            self.popitem(last=False)


class Recorder:
    def __init__(self):
        self.seen, self.count = [], 0

    def note(self, module, inputs, output):
        self.count += 1
        self.seen.append(output.mean().item())
        return output * (1 + 0.01 * self.count)


def counting_closure():
    count, seen = 0, []

    def next_one():
        nonlocal count
        count += 1
        seen.append(count)
        return count + len(seen)

    return next_one


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_change_of_each_kind_is_that_of_the_stock_step(behaviour, tmp_path, caplog):
    """At rho 0, and with learning rate 0 at a rho that is not."""
    for perturbed in (False, True):
        config = XSAMConfig(rho=0.5, alpha=0.5, eigen_interval=1) if perturbed else XSAMConfig(**PLAIN)
        stock, ours = (left_by([behaviour], 2, "SGD", tmp_path, c, still=perturbed) for c in (None, config))
        assert stock == ours
    assert "run again at the same weights" not in caplog.text


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    behaviours=st.lists(st.sampled_from(BEHAVIOURS), min_size=1, max_size=6),
    accumulation=st.sampled_from([1, 2, 3]),
    optimizer=st.sampled_from(["SGD", "AdamW"]),
)
def test_any_mixture_of_changes(behaviours, accumulation, optimizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    stock, ours = (left_by(behaviours, accumulation, optimizer, folder, c) for c in (None, XSAMConfig(**PLAIN)))
    assert stock == ours


def left_by(behaviours, accumulation, optimizer, folder, config, still=False):
    """Return what a training leaves: weights, buffers, other state and what is drawn next, and its losses."""
    torch.manual_seed(0)
    model = Drawn(behaviours)
    kind = Trainer if config is None else XSAMTrainer

    class Still(kind):
        def create_optimizer(self, *args, **kwargs):
            if still:
                self.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.0})
            return super().create_optimizer(*args, **kwargs)

    more = {"optimizer": optimizer, "gradient_accumulation_steps": accumulation}
    trainer = run(model, points(24), folder, config, Still, **more)
    losses = [line["loss"] for line in logs_of(trainer)]
    tensors = {name: value.tolist() for name, value in model.state_dict().items()}
    return {"tensors": tensors, "state": model.state(), "draw": torch.rand(2).tolist(), "losses": losses}

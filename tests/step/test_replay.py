"""Steps run again: whatever a training step does, a run with rho 0 and alpha 0 is the stock Trainer's, bit for bit."""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import BatchEncoding, Trainer

from hf_xsam import XSAMConfig, XSAMTrainer, XSAMTrainerMixin
from hf_xsam.step.kept_state import KeptState
from tests.helpers import PLAIN, arguments, examples_of, logs_of, run, weights_of
from tests.models import Smooth, points


class Centred(Smooth):
    """Takes a running mean from its input, kept in a buffer that is written into, or that another tensor replaces."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x, labels):
        if self.training:
            mean = 0.9 * self.mean + 0.1 * x.mean(0)
            if self.in_place:
                self.mean.copy_(mean)
            else:
                self.mean = mean
        return super().forward(x - self.mean, labels)


class SpectralNorm(Smooth):
    """Its first weight's norm is estimated by a power iteration, a step of which each forward pass takes."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.layers[0])


class Masked(Smooth):
    """Has a buffer whose elements share memory, which nothing can be written into, and a sparse one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 1).expand(4, 6))
        self.register_buffer("mixing", torch.eye(6).to_sparse())

    def forward(self, x, labels):
        return super().forward(torch.sparse.mm(self.mixing, x.T).T * self.mask[:1], labels)


class NoisyInPlace(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["x"] += torch.randn_like(inputs["x"])
        return super().compute_loss(model, inputs, *args, **kwargs)


class SkipsBatches(Trainer):
    """Leaves out each batch whose first label is not the first class: no forward pass, no gradient."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if inputs["labels"][0] != 0:
            return torch.zeros(())
        return super().training_step(model, inputs, num_items_in_batch)


class CallsBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, inputs) / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class TakesAttributes(Trainer):
    """Collates to, and reads from, a mapping that has its items as attributes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        collate = self.data_collator
        self.data_collator = lambda examples: BatchEncoding(collate(examples))

    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(inputs.x, inputs.labels)["loss"]


def with_xsam(kind):
    return type(kind.__name__, (XSAMTrainerMixin, kind), {})


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: Centred(in_place=True), Trainer),
        (lambda: Centred(in_place=False), Trainer),
        (SpectralNorm, Trainer),
        (Masked, Trainer),
        (Smooth, NoisyInPlace),
        (Smooth, SkipsBatches),
        (Smooth, CallsBackward),
        (Smooth, TakesAttributes),
    ],
    ids=["buffer", "assigned", "spectral", "expanded", "noisy", "skips", "backward", "attributes"],
)
def test_without_perturbation_it_is_the_stock_run(build, kind, accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation, "logging_steps": 1}
    stock = run(build(), points(40), tmp_path, trainer_class=kind, **settings)
    ours = run(build(), points(40), tmp_path, XSAMConfig(**PLAIN), with_xsam(kind), **settings)
    assert torch.equal(weights_of(ours.model), weights_of(stock.model))
    for one, other in zip(ours.model.buffers(), stock.model.buffers(), strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())
    for line in logs_of(ours):
        assert line.get("xsam/sharpness", 0.0) == 0.0
    corrected = run(build(), points(40), tmp_path, XSAMConfig(rho=0.1), with_xsam(kind), **settings)
    assert corrected.state.global_step == stock.state.global_step
    assert torch.isfinite(weights_of(corrected.model)).all()
    assert not torch.equal(weights_of(corrected.model), weights_of(stock.model))
    method = "finite_difference" if kind is CallsBackward else "exact"
    assert corrected._xsam_steps.method == method or (kind is SkipsBatches and accumulation > 1)


def test_a_training_step_that_leaves_out_ours_is_named(tmp_path):
    class LeavesOut(XSAMTrainer):
        training_step = CallsBackward.training_step

    trainer = LeavesOut(Smooth(), arguments(tmp_path), train_dataset=examples_of(points(16)))
    with pytest.raises(RuntimeError, match=r"LeavesOut's training_step did not call X-SAM's. Call super\(\)"):
        trainer.train()


def test_micro_batches_synchronize_as_the_trainers_do(tmp_path):
    settings = {"sync_each_batch": True}
    for accumulation_settings, expected in ((settings, False), ({}, True)):
        args = {"accelerator_config": {"gradient_accumulation_kwargs": accumulation_settings}}
        trainer = XSAMTrainer(
            Smooth(), arguments(tmp_path, gradient_accumulation_steps=2, **args), train_dataset=examples_of(points(16))
        )
        with patch.object(trainer.accelerator, "no_sync", wraps=trainer.accelerator.no_sync) as no_sync:
            trainer.train()
        assert no_sync.called == expected


def test_quantized_weights_in_buffers_are_not_copied():
    layer = nn.BatchNorm1d(3)
    layer.register_buffer("qweight", torch.zeros(3, 3, dtype=torch.int32))
    before = KeptState([layer])
    layer.running_mean.fill_(5), layer.qweight.fill_(5)
    before.restore()
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.qweight, torch.full((3, 3), 5, dtype=torch.int32))


def test_steps_without_a_gradient_are_counted_and_change_nothing(tmp_path):
    batch = points(16)
    batch["labels"][:] = 1
    trainer = run(Smooth(), batch, tmp_path, XSAMConfig(rho=0.1), with_xsam(SkipsBatches))
    assert torch.equal(weights_of(trainer.model), weights_of(Smooth()))
    assert trainer.xsam_state.skipped_steps == trainer.state.global_step == trainer.xsam_state.step == 8
    assert logs_of(trainer)[-1]["xsam/skipped_steps"] == 8


def test_exact_products_of_a_step_that_hands_over_no_loss_are_refused_without_leaving_gradients(tmp_path):
    kind = with_xsam(CallsBackward)
    trainer = kind(
        Smooth(), arguments(tmp_path), train_dataset=examples_of(points(16)), xsam_config=XSAMConfig(hvp="exact")
    )
    with pytest.raises(RuntimeError, match="does not pass its loss to accelerator.backward"):
        trainer.train()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_measured_batch_stays_as_it_is(tmp_path):
    batch = points(16)
    before = batch["x"].clone()
    kind = with_xsam(NoisyInPlace)
    kind(Smooth(), arguments(tmp_path), train_dataset=examples_of(batch)).top_eigenpair([batch], iterations=2)
    assert torch.equal(batch["x"], before)

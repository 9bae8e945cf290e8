"""Steps without a second derivative, whose rows are no examples, or that are not one step."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from hf_xsam import XSAMConfig, XSAMTrainer, XSAMTrainerMixin
from hf_xsam.sharpness import MeasureSettings, measure
from tests.helpers import PLAIN, arguments, examples_of, logs_of, run, weights_of
from tests.models import MeanLossTrainer, Smooth, bert, points, sentences

EVERY = {"rho": 0.05, "eigen_interval": 1}


def method_of(build, batch, folder, kind=XSAMTrainer, **config):
    trainer = run(build(), batch, folder, XSAMConfig(**EVERY, **config), kind)
    values = [line["xsam/rayleigh_quotient"] for line in logs_of(trainer)]
    assert all(value != 0 for value in values)
    return trainer._xsam_steps.method


class LossInTraining(Smooth):
    def forward(self, x, labels):
        return super().forward(x, labels) if self.training else {"logits": self.layers(x)}


class Tuples(Smooth):
    def forward(self, x, labels):
        loss = super().forward(x, labels)["loss"]
        return {"loss": loss} if self.training else (self.layers(x), loss, "another form")


class NoGradientWhenEvaluated(Smooth):
    def forward(self, x, labels):
        with torch.set_grad_enabled(self.training):
            return super().forward(x, labels)


class OwnBackward(Trainer):
    """Its loss has a backward pass of its own, as those that cache gradients have."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.enable_grad():
            loss = model(**inputs)["loss"]
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        handle = loss.detach().requires_grad_()

        def backward(scale):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient * scale + (0 if parameter.grad is None else parameter.grad)

        handle.register_hook(backward)
        return handle


class ReadsGradients(Trainer):
    """Adds a penalty on the gradient that the last micro-batch has left."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        loss.backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in model.parameters())
        return loss


def with_xsam(kind):
    return type(kind.__name__, (XSAMTrainerMixin, kind), {})


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (LossInTraining, Trainer),
        (Tuples, Trainer),
        (NoGradientWhenEvaluated, Trainer),
        (Smooth, OwnBackward),
    ],
)
def test_auto_takes_finite_differences(build, kind, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_xsam"):
        assert method_of(build, points(), tmp_path, with_xsam(kind)) == "finite_difference"
    assert "hvp='finite_difference'" in caplog.text


def test_a_step_that_calls_backward_and_reads_gradients(tmp_path):
    stock = run(Smooth(), points(), tmp_path, trainer_class=ReadsGradients)
    ours = run(Smooth(), points(), tmp_path, XSAMConfig(**PLAIN), with_xsam(ReadsGradients))
    assert torch.equal(weights_of(ours.model), weights_of(stock.model))
    assert torch.isfinite(
        weights_of(run(Smooth(), points(), tmp_path, XSAMConfig(**EVERY), with_xsam(ReadsGradients)).model)
    ).all()


@pytest.mark.parametrize("model", [LossInTraining(), NoGradientWhenEvaluated()])
def test_measuring_says_that_there_is_no_loss_to_measure(model):
    settings = MeasureSettings(trace_samples=0, slice_points=0)
    with pytest.raises(ValueError, match="The model returns no loss|has no gradient in evaluation mode"):
        measure(model, [points()], settings, progress=False)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient


class TaskSwitch(Smooth):
    """From the third batch on, an operation without a second derivative, or a path that fails in evaluation mode."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def forward(self, x, labels, task):
        if task[0] and self.fails == "evaluation" and not self.training:
            raise ValueError("no such task in evaluation mode")
        if task[0] and self.fails == "derivative":
            frames = self.layers(x).expand(5, *x.shape[:1], 3).log_softmax(-1)
            sizes = torch.full((len(x),), 5), torch.ones(len(x), dtype=torch.long)
            return {"loss": nn.functional.ctc_loss(frames, labels[:, None].clamp(min=1), *sizes)}
        return super().forward(x, labels)


@pytest.mark.parametrize("fails", ["derivative", "evaluation"])
def test_a_later_batch_without_second_derivative_takes_differences_from_there_on(fails, tmp_path, caplog):
    batch = points(24)
    batch["task"] = torch.arange(24) // 12
    settings = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    trainer = run(TaskSwitch(fails), batch, tmp_path, XSAMConfig(**EVERY), **settings)
    assert trainer.state.global_step == 6
    assert trainer._xsam_steps.method == "finite_difference"
    assert caplog.text.count("X-SAM goes on with finite differences") == 1
    message = {
        "derivative": "hvp is 'exact', but .* failed .*ctc_loss.*Use hvp='finite_difference'",
        "evaluation": "no such task",
    }
    with pytest.raises((RuntimeError, ValueError), match=message[fails]):
        run(TaskSwitch(fails), batch, tmp_path, XSAMConfig(**EVERY, hvp="exact"), **settings)


class Contrastive(Smooth):
    """Tells each row from the others of its batch: one row alone has a loss of 0."""

    def forward(self, x, labels):
        one, other = self.layers(x), self.layers(x + 0.1)
        return {"loss": cross_entropy(one @ other.T, torch.arange(len(x)))}


class Indexed(Smooth):
    """Each row names another row of the whole batch."""

    def forward(self, x, labels, partner):
        return super().forward(x + x[partner], labels)


class TestRows:
    @pytest.mark.parametrize("build", [Contrastive, Indexed])
    def test_that_are_no_examples_stay_together(self, build, tmp_path):
        batch = points(32)
        if build is Indexed:
            batch["partner"] = torch.arange(32).flip(0) % 8
        settings = {"per_device_train_batch_size": 8, "max_steps": 1}
        config = {**EVERY, "hvp": "exact"}
        part = run(build().double(), double(batch), tmp_path, XSAMConfig(**config), **settings)
        whole = run(
            build().double(), double(batch), tmp_path, XSAMConfig(**config, eigen_batch_fraction=1.0), **settings
        )
        assert part._xsam_steps._rows_add_up is False
        assert part.xsam_state.eigenvalue == whole.xsam_state.eigenvalue

    def test_a_later_batch_of_such_rows_is_named(self, tmp_path):
        class Unweighted(Indexed):
            def forward(self, x, labels, partner):
                return Smooth.forward(self, x + 0 * x[partner], labels)

        batch = points(32)
        batch["partner"] = torch.cat([torch.arange(16) % 2, torch.arange(16).flip(0) % 8])
        settings = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
        with pytest.raises(IndexError, match="ran a part of the batch's rows.*rows_are_examples = False"):
            run(Unweighted(), batch, tmp_path, XSAMConfig(**EVERY, hvp="exact"), **settings)

    @pytest.mark.parametrize(("build", "batch"), [(Smooth, points()), (bert, sentences())])
    def test_that_are_examples_are_split(self, build, batch, tmp_path):
        trainer = run(build(), batch, tmp_path, XSAMConfig(**EVERY), MeanLossTrainer)
        assert trainer._xsam_steps._rows_add_up is True


class TestRefused:
    def test_two_calls_in_one_step(self, tmp_path):
        class Halves(XSAMTrainer):
            def training_step(self, model, inputs, *args):
                halves = [{name: value[part] for name, value in inputs.items()} for part in (slice(2), slice(2, 4))]
                return sum(super(Halves, self).training_step(model, half, *args) for half in halves)

        for config in (XSAMConfig(**PLAIN), XSAMConfig.one_pass(0.1)):
            with pytest.raises(RuntimeError, match="twice in one step.*Call super\\(\\).training_step once"):
                run(Smooth(), points(), tmp_path, config, Halves)

    @pytest.mark.parametrize("hooked", [slice(None), slice(1)])
    def test_optimizers_that_step_in_hooks(self, hooked, tmp_path):
        model = Smooth()
        for parameter in list(model.parameters())[hooked]:
            optimizer = torch.optim.SGD([parameter], 0.1)

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(step)
        with pytest.raises(RuntimeError, match="'layers.0.weight' has a post-accumulate-grad hook and no gradient"):
            run(model, points(), tmp_path, XSAMConfig(rho=0.1))


class Spectral(nn.Module):
    """A product of complex weights, or of the same numbers as pairs of real ones."""

    def __init__(self, as_complex):
        super().__init__()
        torch.manual_seed(0)
        pairs = torch.randn(4, 2, dtype=torch.double)
        self.weight = nn.Parameter(torch.view_as_complex(pairs) if as_complex else pairs)
        self.head = nn.Linear(6, 3).double()

    def forward(self, x, labels):
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return {"loss": cross_entropy(self.head(torch.fft.irfft(torch.fft.rfft(x) * weight, n=6)), labels)}


@pytest.mark.parametrize(
    "config",
    [
        XSAMConfig(rho=0.1, alpha=0.0),
        XSAMConfig(rho=0.1, alpha=0.5, eigen_interval=1, hvp="finite_difference"),
        XSAMConfig(rho=0.1, alpha=0.5, eigen_interval=1, hvp="exact"),
        XSAMConfig.one_pass(0.1),
    ],
    ids=["sam", "differences", "exact", "one-pass"],
)
def test_complex_weights_are_pairs_of_real_ones(config, tmp_path):
    found = []
    for as_complex in (True, False):
        trainer = XSAMTrainer(
            Spectral(as_complex), arguments(tmp_path, num_train_epochs=2), xsam_config=config,
            train_dataset=examples_of(double(points())), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
        )  # fmt: skip
        # Power iteration begins at the same vector, however the numbers are held.
        start = {name: torch.ones_like(parameter) for name, parameter in trainer.model.named_parameters()}
        start["weight"] = torch.complex(*torch.ones(2, 4).double()) if as_complex else torch.ones(4, 2).double()
        trainer.xsam_state.eigenvector = start
        trainer.train()
        weight = trainer.model.weight.detach()
        found.append((torch.view_as_real(weight) if as_complex else weight, trainer.xsam_state.eigenvalue))
    (one, value), (other, expected) = found
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if config.hvp == "finite_difference" else 1e-10)
    assert value is expected is None or value.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks(kind, tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers, self.head = kind(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x, labels):
            return {"loss": cross_entropy(self.head(self.layers(x[:, None].expand(-1, 4, -1))[0][:, -1]), labels)}

    settings = {"rho": 0.0, "alpha": 1e-9, "normalize_gradient": False, "eigen_batch_fraction": 1.0}
    runs = [
        run(Recurrent(), points(), tmp_path, XSAMConfig(hvp=hvp, **settings)) for hvp in ("exact", "finite_difference")
    ]
    values = [trainer.xsam_state.eigenvalue.item() for trainer in runs]
    assert values[0] == pytest.approx(values[1], rel=0.05)


def double(batch):
    return {name: column.double() if column.is_floating_point() else column for name, column in batch.items()}

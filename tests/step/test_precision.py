"""Half precision: GradScaler's overflows, autocast, half-precision weights, and compiled models."""

import logging
import math

import pytest
import torch

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.functional.perturbation import ascent_perturbation, perturbed, representable
from hf_xsam.functional.tensors import norm, scale
from tests.cases import TRANSFORMERS
from tests.faults import Run, optimizer_tensors, run_with_fault, same
from tests.helpers import PLAIN, WeightRecorder, logs_of, run, weights_of
from tests.models import Smooth, bert, points, sentences

HALF = [torch.bfloat16, torch.float16]


class TestOverflow:
    """Accelerate refuses fp16 on the CPU, so scaler and autocast are put in by hand; both are the real ones."""

    class Float16(XSAMTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
            return super().create_optimizer(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            with torch.autocast("cpu", dtype=torch.float16):
                return super().compute_loss(*args, **kwargs)

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    @pytest.mark.parametrize("preset", [XSAMConfig, XSAMConfig.one_pass])
    def test_a_scale_that_is_too_large_comes_down_by_itself(self, tmp_path, hvp, preset):
        recorder = WeightRecorder()
        config, settings = preset(hvp=hvp), {"optimizer": "AdamW", "num_train_epochs": 4}
        trainer = run(bert(), sentences(32), tmp_path, config, self.Float16, [recorder], **settings)
        skipped = trainer.xsam_state.skipped_steps
        assert 5 < skipped < 25
        assert trainer.state.global_step == 32
        assert trainer.accelerator.scaler.get_scale() == 2.0 ** (30 - skipped)
        assert torch.equal(recorder.before[5], recorder.before[0])
        assert not torch.equal(recorder.before[-1], recorder.before[0])
        assert all(torch.isfinite(tensor).all() for tensor in optimizer_tensors(trainer))
        assert all(int(step) == 32 - skipped for step in optimizer_tensors(trainer) if step.dim() == 0)
        assert logs_of(trainer)[-1]["xsam/skipped_steps"] == skipped
        assert math.isfinite(logs_of(trainer)[-1]["xsam/rayleigh_quotient"])

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    @pytest.mark.parametrize("kind", ["inf", "nan"])
    @pytest.mark.parametrize("where", ["first pass", "product", "second pass"])
    def test_in_either_pass_or_a_product(self, tmp_path, where, kind, hvp):
        xsam = {"rho": 0.1, "alpha": 1.0, "eigen_interval": 1, "eigen_batch_fraction": 0.25, "hvp": hvp}
        xsam["replay_check"] = "never"
        settings = Run(xsam, accumulation=1, optimizer="AdamW", scaler=True, seed=0)
        # The forward passes of the first step come before, which chooses, in two, the method of exact products.
        before = {"exact": 5, "finite_difference": 3}[hvp]
        faulty = before + ["first pass", "product", "second pass"].index(where)
        trainer, inspector = run_with_fault(settings, kind, [faulty], tmp_path)
        assert inspector.wrong == []
        assert inspector.last_faulty_step == 2
        assert trainer.xsam_state.skipped_steps == 1
        assert trainer.accelerator.scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_a_product_that_is_not_finite_costs_no_step_without_a_scaler(tmp_path, hvp):
    xsam = {"rho": 0.1, "alpha": 1.0, "eigen_warmup_steps": 0, "power_iterations": 2, "hvp": hvp}
    xsam |= {"replay_check": "never", "eigen_interval": 5}
    settings = Run(xsam, accumulation=1, optimizer="SGD", scaler=False, seed=0)
    trainer, inspector = run_with_fault(settings, "nan", [{"exact": 3, "finite_difference": 1}[hvp]], tmp_path)
    assert inspector.wrong == []
    assert trainer.model.count.fired == 1
    assert trainer.xsam_state.skipped_steps == 0
    assert trainer.xsam_state.refreshed_at == 1  # the step after tried again


class TestAutocast:
    def test_equals_the_stock_trainer(self, tmp_path):
        stock = run(bert(0.1), sentences(), tmp_path, bf16=True, gradient_accumulation_steps=2)
        ours = run(bert(0.1), sentences(), tmp_path, XSAMConfig(**PLAIN), bf16=True, gradient_accumulation_steps=2)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    @pytest.mark.parametrize("perturbation", ["gradient", "eigenvector"])
    def test_gives_the_full_precision_run_but_for_rounding(self, tmp_path, hvp, perturbation):
        fields = {"correction": "aligned", "alpha": 0.5, "normalize_gradient": False, "perturbation": perturbation}
        config = XSAMConfig(rho=0.1, hvp=hvp, **fields)
        full = run(bert(), sentences(), tmp_path, config, num_train_epochs=1)
        half = run(bert(), sentences(), tmp_path, config, num_train_epochs=1, bf16=True)
        moved = weights_of(full.model) - weights_of(bert())
        assert not torch.equal(weights_of(half.model), weights_of(full.model))
        assert norm([weights_of(half.model) - weights_of(full.model)]) < 0.1 * norm([moved])
        assert {part.dtype for part in half.xsam_state.eigenvector.values()} == {torch.float32}


class TestHalfPrecisionWeights:
    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("rho", [0.003, 0.05, 0.5])
    @pytest.mark.parametrize("build", TRANSFORMERS)
    def test_the_weights_move_by_rho(self, build, rho, dtype):
        torch.manual_seed(0)
        model, batch = build()
        model.to(dtype).eval()
        batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        model(**batch).loss.backward()
        weights = [p for p in model.parameters() if p.grad is not None]
        before = [weight.detach().clone() for weight in weights]
        direction = ascent_perturbation(weights, [weight.grad for weight in weights], rho)
        with perturbed(weights, direction) as realised:
            moved = norm([w.detach().float() - old.float() for w, old in zip(weights, before, strict=True)])
        assert moved.item() / rho == pytest.approx(1, abs=0.1)
        assert realised.item() == pytest.approx(moved.item() / rho, rel=1e-3)
        assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))

    @pytest.mark.parametrize("dtype", HALF)
    def test_without_enlarging_much_of_it_would_be_rounded_away(self, dtype):
        torch.manual_seed(0)
        weights = [torch.randn(100, 100).to(dtype)]
        direction = scale(torch.tensor(0.01), [torch.randn(100, 100) / 100])
        rounded = weights[0] + direction[0].to(dtype)
        assert norm([rounded.float() - weights[0].float()]) < 0.8 * norm(direction)
        enlarged, realised = representable(weights, direction)
        assert realised.item() == pytest.approx(1, abs=0.02)
        cosine = (enlarged[0] * direction[0]).sum() / norm(enlarged) / norm(direction)
        assert cosine.item() == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize(
        ("dtype", "hvp"),
        [(torch.bfloat16, "exact"), (torch.bfloat16, "finite_difference"), (torch.float16, "auto")],
    )
    def test_training(self, tmp_path, dtype, hvp, caplog):
        trainer = run(bert().to(dtype), sentences(), tmp_path, XSAMConfig(rho=0.1, hvp=hvp, eigen_interval=1))
        assert {p.dtype for p in trainer.model.parameters()} == {dtype}
        assert {part.dtype for part in trainer.xsam_state.eigenvector.values()} == {torch.float32}
        assert trainer.xsam_state.eigenvalue.dtype == torch.float32
        for log in logs_of(trainer):
            assert log["xsam/realised_perturbation"] == pytest.approx(1, abs=0.1)
        assert "lost to rounding" not in caplog.text

    def test_second_derivatives_that_overflow_are_refused(self, tmp_path):
        with pytest.raises(RuntimeError, match="hvp is 'exact'.*overflows in torch.float16.*finite_difference"):
            run(bert().half(), sentences(), tmp_path, XSAMConfig(hvp="exact", eigen_batch_fraction=1.0))

    def test_a_perturbation_that_is_lost_is_named_once(self, tmp_path, caplog):
        caplog.set_level(logging.WARNING)
        trainer = run(bert().bfloat16(), sentences(), tmp_path, XSAMConfig(rho=1e-9, alpha=0.0))
        assert sum(log["xsam/realised_perturbation"] < 0.9 for log in logs_of(trainer)) > 1
        said = [record.getMessage() for record in caplog.records if "lost to rounding" in record.getMessage()]
        assert len(said) == 1
        assert "rho is 1e-09" in said[0]
        assert "float32" in said[0]

    def test_full_precision_is_not_measured(self, tmp_path):
        trainer = run(bert(), sentences(), tmp_path, XSAMConfig(rho=0.1))
        assert "xsam/realised_perturbation" not in logs_of(trainer)[0]


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_compiled_model_gives_the_same(tmp_path, backend, hvp):
    batch = points()
    config = XSAMConfig(rho=0.1, alpha=0.5, eigen_interval=2, hvp=hvp)
    settings = {"num_train_epochs": 1, "gradient_accumulation_steps": 2}
    eager = run(Smooth(), batch, tmp_path, config, **settings)
    torch._dynamo.reset()
    recorder = WeightRecorder()
    compiled = run(
        Smooth(), batch, tmp_path, config, callbacks=[recorder],
        torch_compile=True, torch_compile_backend=backend, **settings,
    )  # fmt: skip
    assert compiled.model_wrapped is not compiled.model
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    tolerance = 1e-6 if hvp == "exact" else 1e-4
    torch.testing.assert_close(weights_of(compiled.model), weights_of(eager.model), rtol=0, atol=tolerance)
    assert compiled._xsam_steps.method == hvp
    assert list(compiled.xsam_state.eigenvector) == list(eager.xsam_state.eigenvector)
    for before, after in zip(recorder.before, recorder.after_gradient, strict=True):
        assert torch.equal(before, after)


def test_same_tells_outcomes_apart():
    left = {"a": [torch.ones(2), None], "b": 1}
    assert same(left, {"a": [torch.ones(2), None], "b": 1})
    assert not same(left, {"a": [torch.zeros(2), None], "b": 1})
    assert not same(left, {"a": [torch.ones(2), None], "b": 2})
    assert not same(left, {"a": [torch.ones(2)], "b": 1})

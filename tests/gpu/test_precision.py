"""fp16 with its GradScaler, bf16, and LoRA on a base model in bfloat16, by the GPU's own autocast."""

from itertools import pairwise

import pytest
import torch

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.step.scope import parameters_in_scope
from tests.gpu.helpers import gpu_arguments, gpu_run, is_finite, top_eigenpair, wide_bert
from tests.helpers import PLAIN, WeightRecorder, examples_of, logs_of, weights_of
from tests.models import Smooth, adapted, bert, points, sentences


class TestOverflow:
    @staticmethod
    def batch():
        """One example of 16 that float16 cannot hold."""
        batch = points()
        batch["x"][5] = 1e6
        return batch

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_the_scaler_skips_the_step_and_lowers_its_scale(self, tmp_path, hvp):
        settings = {"fp16": True, "num_train_epochs": 1, "optimizer": "AdamW"}
        stock = gpu_run(Smooth(), self.batch(), tmp_path, **settings)
        scale = stock.accelerator.scaler.get_scale()
        recorder = WeightRecorder()
        config = XSAMConfig(rho=0.05, eigen_interval=1, hvp=hvp)
        ours = gpu_run(Smooth(), self.batch(), tmp_path, config, callbacks=[recorder], **settings)
        assert ours.accelerator.scaler.get_scale() == scale < 2.0**16
        assert scale == 2.0 ** (16 - ours.xsam_state.skipped_steps)
        assert is_finite(ours.xsam_state)
        assert torch.isfinite(weights_of(ours.model)).all()
        starts = [*recorder.before, weights_of(ours.model)]
        unmoved = sum(torch.equal(one, following) for one, following in pairwise(starts))
        assert unmoved == ours.xsam_state.skipped_steps
        for before, after in zip(recorder.before, recorder.after_gradient, strict=True):
            assert torch.equal(before, after)

    def test_bfloat16_holds_it(self, tmp_path):
        ours = gpu_run(Smooth(), self.batch(), tmp_path, XSAMConfig(rho=0.05), bf16=True)
        assert ours.xsam_state.skipped_steps == 0


class TestEigenvalue:
    """Of weights that do not move: the learning rate is 0, and each step takes all examples."""

    @staticmethod
    def eigenvalue(folder, hvp, **precision):
        config = XSAMConfig(
            rho=0.05, eigen_interval=1, power_iterations=4, eigen_batch_fraction=1.0, eigen_momentum=0.0, hvp=hvp
        )
        settings = {"max_steps": 20, "per_device_train_batch_size": 16, "optim": "sgd", "learning_rate": 0.0}
        trainer = XSAMTrainer(
            model=wide_bert(), args=gpu_arguments(folder, **settings, **precision),
            train_dataset=examples_of(sentences()), xsam_config=config,
        )  # fmt: skip
        trainer.train()
        assert is_finite(trainer.xsam_state)
        assert trainer._xsam_steps.method == hvp
        assert trainer.xsam_state.skipped_steps < 10
        assert {part.dtype for part in trainer.xsam_state.eigenvector.values()} == {torch.float32}
        return trainer.xsam_state.eigenvalue.item()

    @pytest.mark.parametrize(("hvp", "tolerance"), [("exact", 0.05), ("finite_difference", 0.2)])
    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_is_near_that_of_float32(self, tmp_path, precision, hvp, tolerance):
        half = self.eigenvalue(tmp_path, hvp, **{precision: True})
        assert half == pytest.approx(self.eigenvalue(tmp_path, "exact"), rel=tolerance)

    def test_a_scale_that_is_too_large_comes_down_by_itself(self, tmp_path):
        class LargeScale(XSAMTrainer):
            def create_optimizer(self, *args, **kwargs):
                self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)
                return super().create_optimizer(*args, **kwargs)

        settings = {"fp16": True, "num_train_epochs": 4, "trainer_class": LargeScale}
        trainer = gpu_run(bert(), sentences(32), tmp_path, XSAMConfig(), **settings)
        skipped = trainer.xsam_state.skipped_steps
        assert 5 < skipped < 25
        assert trainer.accelerator.scaler.get_scale() == 2.0 ** (30 - skipped)
        assert is_finite(trainer.xsam_state)


class TestLoRAOnBfloat16:
    @staticmethod
    def build():
        model = adapted(dtype=torch.bfloat16, init_lora_weights=False)
        assert {p.dtype for p in parameters_in_scope(model, "lora", "eigen_scope").values()} == {torch.float32}
        return model

    def test_equals_the_stock_trainer(self, tmp_path, deterministic):
        stock = gpu_run(self.build(), sentences(), tmp_path, bf16=True)
        ours = gpu_run(self.build(), sentences(), tmp_path, XSAMConfig(**PLAIN), bf16=True)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_eigenvector_is_that_of_float32(self, tmp_path, hvp):
        def top(model, hvp, **precision):
            config = XSAMConfig(hvp=hvp, eigen_scope="lora")
            return top_eigenpair(model, sentences(), tmp_path, config, 30, use_cpu=False, **precision)[0]

        cosine = top(self.build(), hvp, bf16=True) @ top(self.build().float(), "exact")
        assert abs(cosine.item()) > {"exact": 0.95, "finite_difference": 0.9}[hvp]

    def test_training(self, tmp_path):
        config = XSAMConfig(rho=0.05, eigen_scope="lora", eigen_interval=1)
        trainer = gpu_run(self.build(), sentences(), tmp_path, config, bf16=True)
        assert trainer._xsam_steps.method == "exact"
        assert is_finite(trainer.xsam_state)
        assert all("lora_" in name for name in trainer.xsam_state.eigenvector)
        assert all(log["xsam/sharpness"] > 0 for log in logs_of(trainer))

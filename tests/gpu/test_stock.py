"""On a GPU too, a run with rho 0 and alpha 0 is the stock Trainer's, and X-SAM's is what it is on the CPU."""

import pytest
import torch

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.step.side_effects import RandomState
from tests.gpu.helpers import Convolutions, Recurrent, gpu_arguments, gpu_run, images, sequences, top_eigenpair
from tests.helpers import PLAIN, arguments, examples_of, logs_of, weights_of
from tests.models import bert, llama, padded_text, sentences

MODELS = {
    "bert": (lambda: bert(0.1), sentences),
    "llama": (llama, padded_text),
    "convolutions": (Convolutions, images),
    "lstm": (Recurrent, sequences),
}
PRECISIONS = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}
SETTINGS = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "optimizer": "AdamW"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_without_perturbation_it_is_the_stock_run_bit_for_bit(tmp_path, deterministic, name, precision):
    build, data = MODELS[name]
    settings = {**SETTINGS, **PRECISIONS[precision]}
    stock, again = (gpu_run(build(), data(), tmp_path, **settings) for _ in range(2))
    assert torch.equal(weights_of(again.model), weights_of(stock.model)), "the stock run does not equal itself"
    ours = gpu_run(build(), data(), tmp_path, XSAMConfig(**PLAIN), **settings)
    assert weights_of(ours.model).is_cuda
    assert torch.equal(weights_of(ours.model), weights_of(stock.model))
    assert not torch.equal(weights_of(ours.model).cpu(), weights_of(build()))
    assert [log["loss"] for log in logs_of(ours)] == [log["loss"] for log in logs_of(stock)]
    assert all(log.get("xsam/sharpness", 0) == 0 for log in logs_of(ours))
    if precision == "float16":
        assert ours.accelerator.scaler.get_scale() == stock.accelerator.scaler.get_scale()


@pytest.mark.parametrize("name", MODELS)
def test_kernels_that_may_differ_from_run_to_run(tmp_path, name):
    """Within what two runs of the stock Trainer differ by: if these are equal, so is X-SAM's."""
    build, data = MODELS[name]
    stock, again = (weights_of(gpu_run(build(), data(), tmp_path, **SETTINGS).model) for _ in range(2))
    ours = gpu_run(build(), data(), tmp_path, XSAMConfig(**PLAIN), **SETTINGS)
    own = (again - stock).abs().max().item()
    torch.testing.assert_close(weights_of(ours.model), stock, rtol=0, atol=10 * own)
    assert all(abs(log["xsam/sharpness"]) <= 1e-6 for log in logs_of(ours))


@pytest.mark.parametrize("config", [PLAIN, {"eigen_interval": 1}, {"hvp": "finite_difference"}])
def test_random_numbers_after_a_run_are_those_after_a_stock_run(tmp_path, config):
    def drawn_after(config):
        gpu_run(bert(0.1), sentences(), tmp_path, config, gradient_accumulation_steps=2)
        return torch.rand(4, device="cuda"), torch.rand(4)

    for ours, stock in zip(drawn_after(XSAMConfig(**config)), drawn_after(None), strict=True):
        assert torch.equal(ours, stock)


def test_random_state_of_every_device():
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    state = RandomState.capture(devices)
    first = [torch.rand(4, device=device) for device in devices]
    second = [torch.rand(4, device=device) for device in devices]
    state.restore()
    assert all(torch.equal(torch.rand(4, device=x.device), x) for x in first)
    assert not any(torch.equal(x, y) for x, y in zip(first, second, strict=True))


class TestEqualsTheCPU:
    """In float64; a run from the same start of v, for each device has a random generator of its own."""

    @staticmethod
    def double(batch):
        return {name: column.double() if column.is_floating_point() else column for name, column in batch.items()}

    @classmethod
    def trained(cls, build, batch, args, hvp):
        config = XSAMConfig(rho=0.1, alpha=0.5, eigen_interval=2, eigen_warmup_steps=0, hvp=hvp)
        optimizer = (torch.optim.SGD, {"lr": 1e-2})
        trainer = XSAMTrainer(
            model=build().double(), args=args, train_dataset=examples_of(cls.double(batch)), xsam_config=config,
            optimizer_cls_and_kwargs=optimizer,
        )  # fmt: skip
        trainer.xsam_state.eigenvector = {name: torch.ones_like(p) for name, p in trainer.model.named_parameters()}
        trainer.train()
        return trainer

    @pytest.mark.parametrize(("hvp", "tolerance"), [("exact", 1e-9), ("finite_difference", 1e-6)])
    @pytest.mark.parametrize(("build", "data"), [(bert, sentences), (Convolutions, images)])
    def test_training(self, tmp_path, build, data, hvp, tolerance):
        ours = self.trained(build, data(), gpu_arguments(tmp_path), hvp)
        expected = self.trained(build, data(), arguments(tmp_path), hvp)
        torch.testing.assert_close(weights_of(ours.model).cpu(), weights_of(expected.model), rtol=0, atol=tolerance)
        assert ours._xsam_steps.method == hvp
        assert ours.xsam_state.eigenvalue.item() == pytest.approx(expected.xsam_state.eigenvalue.item(), rel=1e-4)

    @pytest.mark.parametrize(("build", "data"), [(bert, sentences), (llama, padded_text), (Convolutions, images)])
    def test_top_eigenpair(self, tmp_path, build, data):
        batch = self.double(data())
        vector, value = top_eigenpair(build().double(), batch, tmp_path, iterations=200, use_cpu=False)
        expected, expected_value = top_eigenpair(build().double(), batch, tmp_path, iterations=200)
        assert value == pytest.approx(expected_value, rel=1e-4)
        assert abs(vector @ expected).item() > 0.99


class TestResume:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_equals_the_uninterrupted_run(self, tmp_path, deterministic, precision):
        config = XSAMConfig(eigen_interval=3, eigen_warmup_steps=0)
        settings = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant", **PRECISIONS[precision]}
        whole = gpu_run(bert(0.1), sentences(), tmp_path, config, optimizer="AdamW", **settings)
        resumed = XSAMTrainer(
            model=bert(0.1), args=gpu_arguments(tmp_path, **settings), train_dataset=examples_of(sentences()),
            xsam_config=config, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}),
        )  # fmt: skip
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert resumed.state.global_step == whole.state.global_step == 8
        assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
        for name, part in whole.xsam_state.eigenvector.items():
            assert part.is_cuda
            assert torch.equal(resumed.xsam_state.eigenvector[name], part)

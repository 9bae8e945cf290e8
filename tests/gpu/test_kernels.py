"""Beside fused attention, cuDNN's recurrent networks, compiled models, flash-attn, Liger and bitsandbytes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_xsam import XSAMConfig
from tests.gpu.helpers import (
    Recurrent,
    gpu_run,
    is_finite,
    sequences,
    top_eigenpair,
    unpadded_text,
    wide_bert,
    wide_llama,
)
from tests.helpers import PLAIN, logs_of, weights_of
from tests.models import bert, padded_text, sentences

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@pytest.fixture(params=FUSED, ids=lambda backend: backend.name.lower())
def fused(request):
    """A kernel of scaled_dot_product_attention that this GPU has."""
    x = torch.randn(2, 2, 8, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    try:
        with sdpa_kernel(request.param):
            nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
    except RuntimeError as error:
        pytest.skip(f"{request.param.name} does not run here: {error}")
    return request.param


@pytest.mark.parametrize(("build", "data"), [(wide_bert, sentences), (wide_llama, unpadded_text)])
class TestAttention:
    @pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
    def test_training_steps_take_the_fused_kernel_and_exact_products_none(self, tmp_path, fused, build, data, hvp):
        config = XSAMConfig(rho=0.05, eigen_interval=1, hvp=hvp)
        with sdpa_kernel(fused):  # no other is allowed, and a step that cannot take it raises an error
            trainer = gpu_run(build("sdpa"), data(), tmp_path, config, bf16=True)
        assert trainer._xsam_steps.method == {"auto": "exact"}.get(hvp, hvp)
        assert is_finite(trainer.xsam_state)

    def test_the_eigenvector_is_that_of_eager_attention_in_float32(self, tmp_path, fused, build, data):
        settings = {"use_cpu": False, "iterations": 200}
        with sdpa_kernel(fused):
            vector, value = top_eigenpair(build("sdpa"), data(), tmp_path, bf16=True, **settings)
        expected, expected_value = top_eigenpair(build("eager"), data(), tmp_path, **settings)
        assert value == pytest.approx(expected_value, rel=0.05)
        assert abs(vector @ expected).item() > 0.97

    def test_flash_attn(self, tmp_path, build, data):
        pytest.importorskip("flash_attn")
        trainer = gpu_run(build("flash_attention_2"), data(), tmp_path, XSAMConfig(rho=0.05), bf16=True)
        assert trainer._xsam_steps.method == "finite_difference"
        assert is_finite(trainer.xsam_state)


def test_liger(tmp_path):
    pytest.importorskip("liger_kernel")
    trainer = gpu_run(wide_llama(), unpadded_text(), tmp_path, XSAMConfig(rho=0.05), bf16=True, use_liger_kernel=True)
    assert trainer._xsam_steps.method == "finite_difference"
    assert is_finite(trainer.xsam_state)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_adapters_on_a_4_bit_model(tmp_path, hvp):
    pytest.importorskip("bitsandbytes")
    wide_llama().save_pretrained(tmp_path / "base")

    def build():
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map={"": 0}
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(3)
        settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}
        return get_peft_model(model, LoraConfig(**settings, init_lora_weights=False))

    def adapters(trainer):
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    stock = gpu_run(build(), padded_text(), tmp_path, bf16=True)
    ours = gpu_run(build(), padded_text(), tmp_path, XSAMConfig(**PLAIN), bf16=True)
    torch.testing.assert_close(adapters(ours), adapters(stock), rtol=0, atol=1e-6)
    trainer = gpu_run(build(), padded_text(), tmp_path, XSAMConfig(rho=0.05, hvp=hvp), bf16=True)
    assert trainer._xsam_steps.method == hvp
    assert is_finite(trainer.xsam_state)
    assert all("lora_" in name for name in trainer.xsam_state.eigenvector)


class TestRecurrentNetworks:
    """cuDNN's have no backward pass in evaluation mode, and no second derivative: products do without cuDNN."""

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_trains(self, tmp_path, hvp):
        config = XSAMConfig(rho=0.05, eigen_interval=1, hvp=hvp)
        trainer = gpu_run(Recurrent(), sequences(), tmp_path, config)
        assert trainer._xsam_steps.method == hvp
        assert is_finite(trainer.xsam_state)
        assert all(log["xsam/sharpness"] > 0 for log in logs_of(trainer))
        assert trainer.model.lstm.training
        assert torch.backends.cudnn.enabled

    def test_auto_takes_exact_products(self, tmp_path):
        trainer = gpu_run(Recurrent(), sequences(), tmp_path, XSAMConfig(rho=0.05, eigen_interval=1))
        assert trainer._xsam_steps.method == "exact"

    def test_top_eigenpair(self, tmp_path):
        value = top_eigenpair(Recurrent(), sequences(), tmp_path, use_cpu=False)[1]
        assert value == pytest.approx(top_eigenpair(Recurrent(), sequences(), tmp_path)[1], rel=0.05)


class TestCompiled:
    @pytest.fixture(autouse=True)
    @staticmethod
    def fresh():
        yield
        torch._dynamo.reset()

    @staticmethod
    def compiled(config, folder):
        torch._dynamo.reset()
        settings = {"torch_compile": True, "max_steps": 4, "gradient_accumulation_steps": 2}
        return gpu_run(bert(0.1), sentences(32), folder, config, **settings)

    def test_without_perturbation_it_is_the_stock_run(self, tmp_path):
        stock, again = (weights_of(self.compiled(None, tmp_path).model) for _ in range(2))
        ours = self.compiled(XSAMConfig(**PLAIN), tmp_path)
        assert ours.model_wrapped is not ours.model
        own = (again - stock).abs().max().item()
        torch.testing.assert_close(weights_of(ours.model), stock, rtol=0, atol=10 * own)
        assert all(abs(log["xsam/sharpness"]) <= 1e-6 for log in logs_of(ours))  # the replay's dropout is the same

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_gives_what_the_eager_model_does(self, tmp_path, hvp):
        config = XSAMConfig(rho=0.05, alpha=0.5, eigen_interval=2, eigen_warmup_steps=0, hvp=hvp)
        settings = {"max_steps": 4, "gradient_accumulation_steps": 2}
        eager = gpu_run(bert(), sentences(32), tmp_path, config, **settings)
        torch._dynamo.reset()
        ours = gpu_run(bert(), sentences(32), tmp_path, config, torch_compile=True, **settings)
        assert ours._xsam_steps.method == hvp
        assert ours.xsam_state.eigenvalue.item() == pytest.approx(eager.xsam_state.eigenvalue.item(), rel=0.05)
        torch.testing.assert_close(weights_of(ours.model), weights_of(eager.model), rtol=0, atol=1e-3)

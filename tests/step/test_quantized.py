"""Adapters on 4-bit and 8-bit base models, where bitsandbytes is installed."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_xsam import XSAMConfig, XSAMTrainer
from tests.helpers import PLAIN, arguments, logs_of, run
from tests.models import SIZES, padded_text

bitsandbytes = pytest.importorskip("bitsandbytes")

QUANTIZED = {
    "4-bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "4-bit, bfloat16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(params=QUANTIZED)
def build(request, tmp_path_factory):
    """Return a function that builds a quantized model with adapters in float32, equal ones each time."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}  # at least a block of 64 weights
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).save_pretrained(folder)

    def build():
        quantization = QUANTIZED[request.param]
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(3)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(model, config)

    return build


def frozen_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def trained_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_equals_the_stock_trainer(tmp_path, build):
    stock = run(build(), padded_text(), tmp_path)
    ours = run(build(), padded_text(), tmp_path, XSAMConfig(**PLAIN))
    assert torch.equal(trained_of(ours.model), trained_of(stock.model))
    assert not torch.equal(trained_of(ours.model), trained_of(build()))


@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
def test_only_adapters_move(tmp_path, caplog, build, hvp):
    caplog.set_level(logging.INFO, "hf_xsam")
    model = build()
    before = frozen_of(model)

    class Watch(XSAMTrainer):
        """Compares what is frozen in every forward pass, the perturbed ones among them."""

        def compute_loss(self, *args, **kwargs):
            assert all(torch.equal(p, before[name]) for name, p in frozen_of(self.model).items())
            return super().compute_loss(*args, **kwargs)

    trainer = run(model, padded_text(), tmp_path, XSAMConfig(rho=0.1, hvp=hvp, eigen_interval=1), Watch)
    assert len(before) > 10
    assert all("lora_" in name for name in trainer.xsam_state.eigenvector)
    assert all(log["xsam/sharpness"] > 0 and log["xsam/skipped_steps"] == 0 for log in logs_of(trainer))
    assert any("hvp='exact'" in record.getMessage() for record in caplog.records) == (hvp == "auto")


def test_exact_products_are_those_of_the_dequantized_weights(tmp_path, build):
    config = XSAMConfig(hvp="exact", eigen_scope="lora")

    def top_eigenpair(model):
        trainer = XSAMTrainer(model=model, args=arguments(tmp_path), xsam_config=config)
        vector, value, _ = trainer.top_eigenpair([padded_text()], iterations=100)
        return torch.cat([part.flatten() for part in vector.values()]), value

    quantized, value = top_eigenpair(build())
    reference = build()
    reference.base_model.model.dequantize()
    exact, exact_value = top_eigenpair(reference.float())
    assert not any(
        isinstance(m, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt) for m in reference.modules()
    )
    assert abs(quantized @ exact) > 0.99
    assert value == pytest.approx(exact_value, rel=0.05)

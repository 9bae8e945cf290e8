"""X-SAM over PEFT's adapters: LoRA and its kin, IA3, prompt tuning, several adapters."""

import logging

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.step.scope import parameters_in_scope
from tests.helpers import PLAIN, WeightRecorder, arguments, examples_of, run, weights_of
from tests.models import TARGETS, adapted, bert, llama, padded_text, sentences


def prompt_tuned():
    model = llama()
    torch.manual_seed(3)
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def two_adapters():
    model = adapted()
    model.add_adapter("other", LoraConfig(**TARGETS, r=2))
    return model


# How to build each, on what to train it, the eigen_scope of its adapters, and how many numbers these have:
# hidden size 16, intermediate size 32, 2 layers, 2 targets in each.
ADAPTERS = {
    "lora": (adapted, sentences, "lora", 2 * 2 * 2 * (16 + 16)),
    "all layers": (lambda: adapted(target_modules="all-linear"), sentences, "lora", 2 * (4 * 64 + 2 * 96) + 64),
    "dora": (lambda: adapted(use_dora=True), sentences, "lora", 2 * 2 * (2 * (16 + 16) + 16)),
    "adalora": (
        lambda: adapted(AdaLoraConfig, init_r=2, total_step=8),
        sentences,
        "lora",
        2 * 2 * (2 * (16 + 16) + 2),
    ),
    "vera": (lambda: adapted(VeraConfig, r=4), sentences, "vera_", 2 * 2 * (16 + 4)),
    "ia3": (lambda: adapted(IA3Config, feedforward_modules=[]), sentences, "ia3_", 2 * 2 * 16),
    "prompt tuning": (prompt_tuned, padded_text, "prompt_encoder", 3 * 16),
    "two adapters": (two_adapters, sentences, "lora", 2 * 2 * 2 * (16 + 16)),
}
each_adapter = pytest.mark.parametrize("name", ADAPTERS)


@each_adapter
def test_equals_the_stock_trainer(tmp_path, name):
    build, data, scope, _ = ADAPTERS[name]
    settings = {"optimizer": "AdamW", "gradient_accumulation_steps": 2}
    stock = run(build(), data(), tmp_path, **settings)
    config = XSAMConfig(**PLAIN, eigen_scope=scope, perturb_scope=scope)
    ours = run(build(), data(), tmp_path, config, **settings)
    assert torch.equal(weights_of(ours.model), weights_of(stock.model))
    assert not torch.equal(weights_of(ours.model), weights_of(build()))


@each_adapter
def test_eigenvector_and_perturbation_are_of_the_adapters_size(tmp_path, name):
    build, data, scope, size = ADAPTERS[name]
    recorder = WeightRecorder()
    config = XSAMConfig(eigen_scope=scope, perturb_scope=scope, alpha=1.0, eigen_interval=1)
    trainer = run(build(), data(), tmp_path, config, callbacks=[recorder])
    vector = trainer.xsam_state.eigenvector
    # PEFT's own account of what belongs to the active adapter, without what is trained beside it.
    saved = {key: t for key, t in get_peft_model_state_dict(trainer.model).items() if "classifier" not in key}
    trained = sum(t.numel() for key, t in saved.items() if "vera_A" not in key and "vera_B" not in key)
    assert sum(part.nbytes for part in vector.values()) == 4 * size
    assert trained == size
    assert not any("classifier" in key or ".other" in key for key in vector)
    for before, after in zip(recorder.before, recorder.after_gradient, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("scope", ["lora", "trainable", r"layer\.1\..*lora_B"])
def test_products_agree_with_the_dense_hessian(tmp_path, settings, scope):
    model = adapted(init_lora_weights=False, **settings).double()
    trainer = XSAMTrainer(model=model, args=arguments(tmp_path), xsam_config=XSAMConfig(hvp="exact", eigen_scope=scope))
    parameters, batch = parameters_in_scope(model, scope, "eigen_scope"), sentences()
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat):
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        weights = {name: part.view_as(p) for (name, p), part in parts}
        return torch.func.functional_call(model, weights, kwargs=batch).loss

    with sdpa_kernel(SDPBackend.MATH):
        start = torch.cat([p.detach().flatten() for p in parameters.values()])
        hessian = torch.autograd.functional.hessian(loss, start)
    values, vectors = torch.linalg.eigh(hessian)
    vector, value, _ = trainer.top_eigenpair([batch], iterations=400)
    assert list(vector) == list(parameters)
    flat = torch.cat([part.flatten() for part in vector.values()])
    # (H - value) v vanishes for an eigenvector alone.
    assert value == pytest.approx(values[-1].item(), rel=1e-6)
    assert abs(flat @ vectors[:, -1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3"])
def test_merged_after_training(tmp_path, name):
    build, data, scope, _ = ADAPTERS[name]
    model = run(build(), data(), tmp_path, XSAMConfig(eigen_scope=scope), optimizer="AdamW").model.eval()
    outputs = model(**data()).logits
    merged = model.merge_and_unload()
    assert not any("lora" in key or "ia3" in key or "vera" in key for key in merged.state_dict())
    torch.testing.assert_close(merged(**data()).logits, outputs, rtol=0, atol=1e-5)
    assert (outputs - bert().eval()(**data()).logits).abs().max() > 1e-3


def test_only_the_active_adapter_is_trained(tmp_path):
    model = two_adapters()
    before = {key: p.clone() for key, p in model.named_parameters() if ".other" in key}
    assert before
    run(model, sentences(), tmp_path, XSAMConfig(rho=0.5, eigen_interval=1))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[key], p) for key, p in before.items())
    assert all(after[key].grad is None for key in before)


def test_saves_the_adapter_alone(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    model = adapted()
    model.base_model.model.name_or_path = model.peft_config["default"].base_model_name_or_path = str(base)
    trainer = run(model, sentences(), tmp_path / "out", XSAMConfig(eigen_scope="lora"))
    trainer.save_model(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == 2 * 2 * 2 + 2
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(**sentences()).logits, trainer.model.eval()(**sentences()).logits)


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt tuning"])
def test_resumes_bit_for_bit(tmp_path, name):
    build, data, scope, _ = ADAPTERS[name]
    config = XSAMConfig(eigen_scope=scope, perturb_scope=scope, eigen_interval=3)
    settings = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    whole = run(build(), data(), tmp_path, config, optimizer="AdamW", **settings)
    resumed = XSAMTrainer(
        model=build(),
        args=arguments(tmp_path, **settings),
        train_dataset=examples_of(data()),
        xsam_config=config,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    for key, part in whole.xsam_state.eigenvector.items():
        assert torch.equal(resumed.xsam_state.eigenvector[key], part)


class TestHalfPrecisionBase:
    """PEFT keeps the adapters in float32 where the base model is in bfloat16."""

    @staticmethod
    def build():
        model = adapted(dtype=torch.bfloat16, init_lora_weights=False)
        assert {p.dtype for p in parameters_in_scope(model, "lora", "eigen_scope").values()} == {torch.float32}
        return model

    def test_equals_the_stock_trainer(self, tmp_path):
        stock = run(self.build(), sentences(), tmp_path)
        ours = run(self.build(), sentences(), tmp_path, XSAMConfig(**PLAIN))
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_eigenvector_is_that_of_float32(self, tmp_path, hvp):
        def top(model, hvp):
            config = XSAMConfig(hvp=hvp, eigen_scope="lora")
            trainer = XSAMTrainer(model=model, args=arguments(tmp_path), xsam_config=config)
            vector = trainer.top_eigenpair([sentences()], iterations=30).eigenvector
            return torch.cat([part.flatten() for part in vector.values()])

        cosine = top(self.build(), hvp) @ top(self.build().float(), "exact")
        assert abs(cosine.item()) > 0.95


def test_auto_takes_double_backward(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_xsam")
    run(adapted(), sentences(), tmp_path, XSAMConfig(eigen_scope="lora"))
    assert [r for r in caplog.records if "hvp='exact'" in r.getMessage()]

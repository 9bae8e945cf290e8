"""What `perturb_scope` and `eigen_scope` choose, and what the step does with it."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.step.scope import others_frozen, parameters_in_scope
from tests.helpers import PLAIN, arguments, logs_of, run, weights_of
from tests.models import BatchNormClassifier, bert, llama, points, sentences


def names_in(model, scope):
    return list(parameters_in_scope(model, scope, "perturb_scope"))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def resnet():
    return ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))


def convnext():
    return ConvNextV2ForImageClassification(ConvNextV2Config(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1]))


class TestNormalizationLayers:
    @pytest.mark.parametrize(
        ("build", "marks", "count"),
        [
            (bert, ("LayerNorm.",), 10),
            (llama, ("layernorm.", "model.norm."), 5),
            (t5, ("layer_norm.",), 7),
            (resnet, ("normalization.",), 8),
            (convnext, ("layernorm.", "downsampling_layer.0."), 18),
            (BatchNormClassifier, ("layers.1.",), 2),
        ],
    )
    def test_are_found_by_type(self, build, marks, count):
        model = build()
        found = names_in(model, "norm")
        assert found == [name for name, _ in model.named_parameters() if any(mark in name for mark in marks)]
        assert len(found) == count

    def test_a_name_is_no_evidence(self):
        class Normalized(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.Linear(2, 2)
                self.scale = nn.GroupNorm(1, 2)

        assert names_in(Normalized(), "norm") == ["scale.weight", "scale.bias"]

    def test_under_peft(self):
        tuned = get_peft_model(bert(), LNTuningConfig(target_modules=["LayerNorm"]))
        assert all("ln_tuning_layers" in name for name in names_in(tuned, "norm"))
        saved = get_peft_model(bert(), LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"]))
        assert all("LayerNorm.modules_to_save.default" in name for name in names_in(saved, "norm"))
        assert len(names_in(tuned, "norm")) == len(names_in(saved, "norm")) == 10


def test_lora_is_not_what_is_trained_beside_it():
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], trainable_token_indices=[1, 2])
    model = get_peft_model(bert(), config, adapter_name="lora_a")
    others = [name for name in names_in(model, "trainable") if name not in names_in(model, "lora")]
    assert [name.split(".")[-1] for name in others] == ["lora_a", "weight", "bias"]
    assert "trainable_tokens_delta" in others[0]
    assert all("classifier.modules_to_save.lora_a" in name for name in others[1:])
    assert len(names_in(model, "lora")) == 4


@pytest.mark.parametrize("field", ["perturb_scope", "eigen_scope"])
@pytest.mark.parametrize("scope", ["lora", "norm", "no_such_layer"])
def test_a_scope_that_matches_nothing_is_refused(tmp_path, field, scope):
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    with pytest.raises(ValueError, match=f"{field} is '{scope}'.*bert.embeddings.word_embeddings.weight"):
        XSAMTrainer(model=model, args=arguments(tmp_path), xsam_config=XSAMConfig(**{field: scope}))


class TestPerturbScope:
    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("scope", ["trainable", "norm", r"layer\.1\."])
    def test_step_of_sam_on(self, tmp_path, scope, adaptive):
        """eps over the scope alone, within rho; the descent gradient over all parameters."""
        model, batch, rho = bert().double(), sentences(4), 0.3
        named = dict(model.named_parameters())
        chosen = [named[name] for name in names_in(model, scope)]
        start = {name: p.detach().clone() for name, p in named.items()}
        gradient = torch.autograd.grad(model(**batch).loss, chosen)
        factor = [p.detach().abs() if adaptive else torch.ones_like(p) for p in chosen]
        length = sum((t * g).square().sum() for t, g in zip(factor, gradient, strict=True)).sqrt()
        with torch.no_grad():
            for p, t, g in zip(chosen, factor, gradient, strict=True):
                p.add_(rho * t**2 * g / length)
        moved = torch.autograd.grad(model(**batch).loss, list(named.values()))

        config = XSAMConfig(**{**PLAIN, "rho": rho}, perturb_scope=scope, adaptive=adaptive)
        trained = run(bert().double(), batch, tmp_path, config, max_steps=1).model
        for (name, weight), g in zip(trained.named_parameters(), moved, strict=True):
            torch.testing.assert_close(weight.detach(), start[name] - 1e-2 * g, rtol=0, atol=1e-12)

    def test_a_scope_that_the_loss_does_not_reach_is_not_perturbed(self, tmp_path):
        config = XSAMConfig(rho=0.5, alpha=0.0, perturb_scope="unused")
        trainer = run(BatchNormClassifier(), points(), tmp_path, config)
        assert all(log["xsam/sharpness"] == 0 for log in logs_of(trainer))
        stock = run(BatchNormClassifier(), points(), tmp_path)
        assert torch.equal(weights_of(trainer.model), weights_of(stock.model))

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_does_not_move_the_eigenvector(self, tmp_path, hvp):
        """v is that of the loss at w, whatever is perturbed."""
        settings = {"hvp": hvp, "eigen_scope": r"layer\.1\."}
        runs = [
            run(bert(), sentences(4), tmp_path, XSAMConfig(**settings, perturb_scope=scope), max_steps=1)
            for scope in ("norm", "trainable")
        ]
        first, second = (trainer.xsam_state.eigenvector for trainer in runs)
        assert all(torch.equal(first[name], second[name]) for name in second)
        assert not torch.equal(*(weights_of(trainer.model) for trainer in runs))


class TestMemory:
    """Of the graphs of a Hessian-vector product, in bytes that autograd saves."""

    def saved_bytes(self, model, folder, scope, monkeypatch):
        config = XSAMConfig(hvp="exact", eigen_scope=scope)
        trainer = XSAMTrainer(model=model, args=arguments(folder), xsam_config=config)
        batch, kept = sentences(), 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        # Choosing would compute the loss with nothing frozen.
        monkeypatch.setattr("hf_xsam.step.curvature.choose_method", lambda *_: "exact")
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.top_eigenpair([batch], iterations=1)
        return kept

    def test_parameters_out_of_scope_need_none(self, tmp_path, monkeypatch):
        scope = r"layer\.1\."
        frozen = bert()
        for name, parameter in frozen.named_parameters():
            parameter.requires_grad_("layer.1." in name)
        ours = self.saved_bytes(bert(), tmp_path, scope, monkeypatch)
        assert ours == self.saved_bytes(frozen, tmp_path, "trainable", monkeypatch)
        assert ours < self.saved_bytes(bert(), tmp_path, "trainable", monkeypatch) / 2

    def test_others_are_frozen_for_the_block_alone(self):
        model = bert()
        model.bert.pooler.requires_grad_(False)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        with others_frozen(model, list(model.classifier.parameters())):
            within = [name for name, p in model.named_parameters() if p.requires_grad]
        assert within == ["classifier.weight", "classifier.bias"]
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


class TestProductsInAScope:
    def test_exact_trusts_operations_defined_in_python_and_warns(self, tmp_path, caplog):
        class Square(torch.autograd.Function):
            """Its second derivative, as autograd takes it, is without the square's own."""

            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.square()

            @staticmethod
            def backward(ctx, gradient):
                return 2 * ctx.saved_tensors[0].detach() * gradient

        class Squared(type(bert())):
            def forward(self, **inputs):
                output = super().forward(**inputs)
                output["loss"] = Square.apply(output["loss"])
                return output

        for hvp, warnings in {"auto": 0, "exact": 1}.items():
            caplog.clear()
            run(Squared(bert().config), sentences(), tmp_path, XSAMConfig(hvp=hvp))
            said = [
                r.getMessage()
                for r in caplog.records
                if r.name == "hf_xsam.step.double_backward" and r.levelname == "WARNING"
            ]
            assert len(said) == warnings
            assert all("SquareBackward cannot be trusted: compare with" in message for message in said)

    def test_checkpointed_layers(self, tmp_path):
        """They are computed again in the product's backward passes, with the same parameters frozen."""
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        config = XSAMConfig(hvp="exact", eigen_scope=r"layer\.1\.", eigen_interval=1)
        plain = run(bert(0.1).double(), sentences(), tmp_path, config)
        saving = run(bert(0.1).double(), sentences(), tmp_path, config, **settings)
        torch.testing.assert_close(weights_of(saving.model), weights_of(plain.model), rtol=0, atol=1e-9)

    def test_reentrant_checkpointing_is_seen_though_the_layers_in_scope_take_no_gradient_to_it(self, tmp_path):
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        config = XSAMConfig(eigen_scope=r"layer\.0\.|classifier")
        trainer = run(bert(), sentences(), tmp_path, config, **settings)
        assert trainer.xsam_state.eigenvector["bert.encoder.layer.0.output.dense.weight"].norm() > 0
        with pytest.raises(RuntimeError, match="hvp is 'exact'.*use_reentrant"):
            run(bert(), sentences(), tmp_path, XSAMConfig(**{**config.to_dict(), "hvp": "exact"}), **settings)

    def test_a_scope_that_the_loss_does_not_reach(self, tmp_path):
        trainer = run(BatchNormClassifier(), points(), tmp_path, XSAMConfig(hvp="exact", eigen_scope="unused"))
        assert trainer.xsam_state.eigenvalue == 0

"""X-SAM in sentence-transformers' trainer: what equals the stock trainer, for which losses, and what is refused."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")

import scipy.signal
import scipy.special
from datasets import Dataset, DatasetDict
from embedded import minilm_folder
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    SoftmaxLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel

from hf_xsam import XSAMCallback, XSAMConfig
from hf_xsam.integrations.sentence_transformers import XSAMSentenceTransformerTrainer
from hf_xsam.sharpness import MeasureSettings
from tests.helpers import PLAIN, TINY, logs_of, save_tiny_classifier, weights_of
from tests.integrations.test_rerankers import save_models

PAIRS = {
    "anchor": ["good film", "a dull plot", "great", "the bad film", "fine plot", "poor film"] * 2,
    "positive": ["fine film", "the poor plot", "a good film", "dull film", "a great plot", "the bad plot"] * 2,
}
RANKED = Dataset.from_dict(PAIRS)
SCORED = Dataset.from_dict({**PAIRS, "score": [1.0, 0.8, 0.9, 0.2, 0.5, 0.0] * 2})
CLASSED = Dataset.from_dict({**PAIRS, "label": [0, 1, 2, 1, 0, 2] * 2})


def softmax(model):
    torch.manual_seed(5)
    return SoftmaxLoss(model, embedding_dimension=16, num_labels=3)


LOSSES = {
    "ranking": (MultipleNegativesRankingLoss, RANKED, "exact"),
    "cached": (lambda m: CachedMultipleNegativesRankingLoss(m, mini_batch_size=2), RANKED, "finite_difference"),
    "cosent": (CoSENTLoss, SCORED, "exact"),
    "matryoshka": (lambda m: MatryoshkaLoss(m, MultipleNegativesRankingLoss(m), [16, 8, 4]), RANKED, "exact"),
    "matryoshka-cached": (
        lambda m: MatryoshkaLoss(m, CachedMultipleNegativesRankingLoss(m, mini_batch_size=2), [16, 8]),
        RANKED,
        "finite_difference",
    ),
    "matryoshka-sampled": (
        lambda m: MatryoshkaLoss(m, CoSENTLoss(m), [16, 8, 4], n_dims_per_step=2),
        SCORED,
        "exact",
    ),
    "softmax": (softmax, CLASSED, "exact"),
}
EVERY_LOSS = pytest.mark.parametrize(("loss", "data", "method"), LOSSES.values(), ids=LOSSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "bert"
    save_tiny_classifier(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=18, **TINY)).save_pretrained(folder)
    return folder


def embedder(folder):
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def trained(folder, output, kind, loss, data, config=None, callback=False, resume=None, **overrides):
    values = {"output_dir": str(output), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    values |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    model = embedder(folder)
    own = {} if kind is SentenceTransformerTrainer else {"xsam_config": config}
    trainer = kind(
        model=model,
        args=SentenceTransformerTrainingArguments(**{**values, **overrides}),
        train_dataset=data,
        loss=loss(model),
        **own,
    )
    if callback:
        settings = MeasureSettings(rhos=[], trace_samples=0, hvp="finite_difference")
        trainer.add_callback(XSAMCallback(trainer, every=1, samples=4, settings=settings))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def all_weights(trainer):
    """Return the weights of the model and of the loss."""
    return torch.cat([weights_of(trainer.model), weights_of(trainer.loss)])


@pytest.mark.parametrize("accumulation", [1, 2])
@EVERY_LOSS
def test_equals_the_stock_trainer(folder, tmp_path, loss, data, method, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "eval_strategy": "no"}
    stock = trained(folder, tmp_path, SentenceTransformerTrainer, loss, data, **options)
    ours = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, loss, data, XSAMConfig(**PLAIN), **options)
    assert torch.equal(all_weights(ours), all_weights(stock))
    for one, other in zip(logs_of(ours), logs_of(stock), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


@EVERY_LOSS
def test_a_corrected_step(folder, tmp_path, caplog, loss, data, method):
    config = XSAMConfig(rho=0.05, eigen_interval=1, log_metrics="all")
    stock = trained(folder, tmp_path, SentenceTransformerTrainer, loss, data)
    ours = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, loss, data, config, max_steps=2)
    assert ours._xsam_steps.method == method
    first = logs_of(ours)[0]
    assert first["loss"] == logs_of(stock)[0]["loss"]
    assert first["xsam/rayleigh_quotient"] != 0
    assert first["xsam/perturbed_loss"] > first["loss"]
    assert "run again at the same weights" not in caplog.text
    assert not torch.equal(all_weights(ours), all_weights(stock))


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def test_a_cached_loss_has_the_curvature_of_the_loss_itself(folder, tmp_path):
    found = []
    for name in ("ranking", "cached"):
        loss, data, _ = LOSSES[name]

        def in_float64(model, loss=loss):
            return loss(model.double())

        still = {"config": XSAMConfig(**PLAIN), "learning_rate": 0.0, "max_steps": 1}
        trainer = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, in_float64, data, **still)
        found.append(trainer.top_eigenpair([batch_of(trainer)], iterations=10).eigenvalue)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_guide_of_a_loss_stays(folder, tmp_path):
    guides = []

    def loss(model):
        guides.append(embedder(folder))
        return GISTEmbedLoss(model, guides[-1])

    config = XSAMConfig.one_pass(0.5, perturbation="random")
    moved, before = [], weights_of(embedder(folder))
    trainer = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, loss, RANKED, config)
    guides[-1].register_forward_pre_hook(lambda guide, _: moved.append(not torch.equal(weights_of(guide), before)))
    trainer.train()
    assert moved
    assert not any(moved)


def test_losses_by_data_set(folder, tmp_path):
    def losses(model):
        return {"ranked": MultipleNegativesRankingLoss(model), "scored": CoSENTLoss(model)}

    weights = []
    for kind in (SentenceTransformerTrainer, XSAMSentenceTransformerTrainer):
        data = DatasetDict(ranked=RANKED, scored=SCORED)
        trainer = trained(folder, tmp_path, kind, losses, data, XSAMConfig(**PLAIN), max_steps=4)
        weights.append(weights_of(trainer.model))
    assert torch.equal(*weights)


class TestParametersOfTheLoss:
    """Of `SoftmaxLoss`: a classifier."""

    def test_an_exception_leaves_no_gradient(self, folder, tmp_path):
        trainer = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, softmax, CLASSED, max_steps=1)
        trainer.training_step(trainer.model, batch_of(trainer))
        trainer.model.zero_grad()
        trainer.loss.zero_grad()

        def fail(*_):
            raise KeyboardInterrupt

        hook = trainer.loss.classifier.register_full_backward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            trainer.training_step(trainer.model, batch_of(trainer))
        assert all(parameter.grad is None for parameter in trainer.loss.parameters())
        hook.remove()
        trainer.training_step(trainer.model, batch_of(trainer))

    def test_a_compiled_run_resumes(self, folder, tmp_path):
        compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
        run = (XSAMSentenceTransformerTrainer, softmax, CLASSED, XSAMConfig(eigen_interval=2))
        trained(folder, tmp_path, *run, save_strategy="steps", save_steps=2, **compiled)
        again = trained(folder, tmp_path / "again", *run, resume=str(tmp_path / "checkpoint-2"), **compiled)
        assert not any("_orig_mod" in name for name in again.xsam_state.eigenvector)

    @pytest.mark.parametrize(("scope", "moved"), [("trainable", True), (r"^model\.", False), ("^classifier", True)])
    def test_a_step_against_one_by_hand(self, folder, tmp_path, scope, moved):
        rho, rate = 0.5, 0.1
        config = XSAMConfig(rho=rho, alpha=0.0, perturb_scope=scope, hvp="exact")
        seen = []

        def loss_of(model):
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            loss = softmax(model.double()).double()
            loss.classifier.register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
            return loss

        options = {"max_steps": 1, "optim": "sgd", "learning_rate": rate, "lr_scheduler_type": "constant"}
        options |= {"max_grad_norm": 0.0, "per_device_train_batch_size": len(CLASSED)}
        trainer = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, loss_of, CLASSED, config, **options)
        assert any(not torch.equal(weight, seen[0]) for weight in seen) == moved

        loss = loss_of(embedder(folder))
        parameters = dict(loss.named_parameters())
        chosen = [p for name, p in parameters.items() if scope == "trainable" or name.startswith(scope[1:6])]
        batch = trainer.data_collator([CLASSED[i] for i in range(len(CLASSED))])

        def gradient(of):
            features, labels = trainer.collect_features(batch)
            return torch.autograd.grad(loss(features, labels), of, materialize_grads=True)

        def move(moved, along, by):
            with torch.no_grad():
                for parameter, direction in zip(moved, along, strict=True):
                    parameter.add_(by * direction)

        ascent = gradient(chosen)
        by = rho / torch.nn.utils.parameters_to_vector(ascent).norm()
        move(chosen, ascent, by)
        descent = gradient(list(parameters.values()))
        move(chosen, ascent, -by)
        move(parameters.values(), descent, -rate)
        torch.testing.assert_close(all_weights(trainer), torch.cat([weights_of(loss.model), weights_of(loss)]))

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_measuring_leaves_them_without_gradients(self, folder, tmp_path, hvp):
        runs = [
            trained(
                folder, tmp_path, XSAMSentenceTransformerTrainer, softmax, CLASSED, XSAMConfig(hvp=hvp), callback=given
            )
            for given in (False, True)
        ]
        assert torch.equal(all_weights(runs[0]), all_weights(runs[1]))
        assert any("sharpness/top_eigenvalue" in line for line in runs[1].state.log_history)

    def test_the_eigenvector_spans_them(self, folder, tmp_path):
        config = XSAMConfig(eigen_interval=1)
        trainer = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, softmax, CLASSED, config)
        assert trainer.xsam_state.eigenvector["classifier.weight"].norm() > 0

    def test_of_one_loss_of_several_they_are_refused(self, folder, tmp_path):
        with pytest.raises(ValueError, match="The optimizer trains 2 parameters that do not belong to the model"):
            trained(
                folder,
                tmp_path,
                XSAMSentenceTransformerTrainer,
                lambda model: {"classed": softmax(model)},
                DatasetDict(classed=CLASSED),
            )


def test_two_processes(folder, tmp_path):
    save_models(tmp_path)
    script = Path(__file__).parent / "sentence_transformers_run.py"
    root = script.parent.parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "recipes")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*command, script, folder, tmp_path], capture_output=True, text=True, timeout=300, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("equal") == 2


@pytest.mark.parametrize("loss", ["ranking", "softmax"])
def test_resume_equals_the_uninterrupted_run(folder, tmp_path, loss):
    loss, data, _ = LOSSES[loss]

    def frozen_apart(model):  # stock checkpoints lack the loss's parameters
        built = loss(model)
        if hasattr(built, "classifier"):
            built.classifier.requires_grad_(False)
        return built

    run = (XSAMSentenceTransformerTrainer, frozen_apart, data, XSAMConfig(eigen_interval=2))
    whole = trained(folder, tmp_path / "whole", *run, max_steps=4)
    trained(folder, tmp_path / "run", *run, max_steps=4, save_strategy="steps", save_steps=2)
    again = trained(folder, tmp_path / "again", *run, max_steps=4, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(weights_of(again.model), weights_of(whole.model))


def test_the_card_is_theirs_and_x_sam_s(folder, tmp_path):
    loss, data, _ = LOSSES["ranking"]
    trainer = trained(folder, tmp_path, XSAMSentenceTransformerTrainer, loss, data, XSAMConfig(rho=0.02))
    trainer.save_model()
    trainer.create_model_card(model_name="embedder")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"x-sam", "sentence-transformers", "loss:MultipleNegativesRankingLoss"} <= set(card.data.tags)
    assert "## Sharpness-aware training" in card.text
    assert XSAMConfig.from_pretrained(tmp_path) == XSAMConfig(rho=0.02)
    assert SentenceTransformer(str(tmp_path), device="cpu").encode("good film").shape == (16,)


def documented_functions(module):
    """Return the module's functions with what their docstrings say of them first, beside their names as words."""
    pairs = {}
    for name in module.__all__:
        lines = inspect.getdoc(getattr(module, name)).splitlines()
        said = next((line for line in lines if line and "(" not in line), "")
        if len(said.split()) > 2:
            pairs[said] = name.replace("_", " ")
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ranking", "cached"])
def test_real_pairs_with_a_real_model(tmp_path, loss):
    """scipy's docstrings find the names of what they describe, better after a few steps than before."""
    model = SentenceTransformer(minilm_folder(), device="cpu")
    pairs = documented_functions(scipy.special) | documented_functions(scipy.signal)
    held_out = dict(list(pairs.items())[::4])
    data = {said: name for said, name in pairs.items() if said not in held_out}
    numbered = {str(i): said for i, said in enumerate(held_out)}
    corpus = {str(i): name for i, name in enumerate(held_out.values())}
    evaluator = InformationRetrievalEvaluator(numbered, corpus, {number: {number} for number in numbered}, name="names")
    before = evaluator(model)[evaluator.primary_metric]
    args = {"output_dir": str(tmp_path), "per_device_train_batch_size": 16, "learning_rate": 5e-5, "use_cpu": True}
    trainer = XSAMSentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**args, max_steps=8, report_to="none", save_strategy="no"),
        train_dataset=Dataset.from_dict({"anchor": list(data), "positive": list(data.values())}),
        loss=LOSSES[loss][0](model),
        evaluator=evaluator,
        xsam_config=XSAMConfig(rho=0.01, eigen_interval=4, power_iterations=1),
    )
    trainer.train()
    after = trainer.evaluate()[f"eval_{evaluator.primary_metric}"]
    print(before, after)
    assert after > before + 0.01

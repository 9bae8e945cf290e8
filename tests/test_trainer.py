"""X-SAM against the stock Trainer, and with the Trainer's features."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_xsam import XSAMConfig, XSAMSeq2SeqTrainer, XSAMTrainer, XSAMTrainerMixin
from hf_xsam.step.logs import Advice
from tests.helpers import PLAIN, WeightRecorder, arguments, examples_of, logs_of, run, weights_of
from tests.models import (
    SIZES,
    BatchNormClassifier,
    MeanLossTrainer,
    Smooth,
    bert,
    llama,
    padded_text,
    points,
    sentences,
)


class TestEqualsStockTrainer:
    """With rho = 0 and alpha = 0, bit for bit."""

    @pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    @pytest.mark.parametrize(
        ("examples", "accumulation"), [(16, 1), (16, 2), (20, 2), (18, 4)], ids=["1x4", "2x4", "short-window", "both"]
    )
    def test_weights_and_losses(self, tmp_path, optimizer, dropout, examples, accumulation):
        settings = {"optimizer": optimizer, "gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0}
        stock = run(bert(dropout), sentences(examples), tmp_path, **settings)
        ours = run(bert(dropout), sentences(examples), tmp_path, XSAMConfig(**PLAIN), **settings)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))
        assert not torch.equal(weights_of(ours.model), weights_of(bert(dropout)))
        for ours_log, stock_log in zip(logs_of(ours), logs_of(stock), strict=True):
            assert {name: ours_log[name] for name in stock_log} == stock_log

    def test_estimating_the_eigenvector_consumes_no_randomness(self, tmp_path):
        def drawn_after(config):
            run(bert(0.1), sentences(), tmp_path, config, gradient_accumulation_steps=2)
            return torch.rand(4)

        assert torch.equal(drawn_after(XSAMConfig()), drawn_after(None))

    def test_a_replay_sees_the_same_dropout(self, tmp_path):
        log = logs_of(run(bert(0.3), sentences(), tmp_path, XSAMConfig(**PLAIN)))[0]
        assert log["xsam/sharpness"] == 0
        assert log["xsam/gradient_norm"] == log["xsam/perturbed_gradient_norm"]


class TestAccumulation:
    """Micro-batches give the weights of the whole batch."""

    CONFIG = {"rho": 0.1, "alpha": 0.5, "eigen_interval": 2}

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    @pytest.mark.parametrize("correction", ["paper", "projection", "aligned"])
    def test_mean_loss(self, tmp_path, correction, hvp):
        config = XSAMConfig(**self.CONFIG, correction=correction, hvp=hvp)
        self.check(lambda: bert().double(), sentences(), tmp_path, config, MeanLossTrainer)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_causal_language_model_with_padding(self, tmp_path, adaptive):
        config = XSAMConfig(**self.CONFIG, adaptive=adaptive)
        self.check(lambda: llama().double(), padded_text(), tmp_path, config, XSAMTrainer)

    def test_what_is_left_of_data_without_a_length_equals_stock(self, tmp_path):
        """The third micro-batch of an epoch waits for the next epoch's first two, and was divided by another number."""

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from examples_of(points(12))

        weights = []
        for kind, config in ((Trainer, {}), (XSAMTrainer, {"xsam_config": XSAMConfig(**PLAIN)})):
            args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=4)
            optimizer = (torch.optim.SGD, {"lr": 0.1})
            trainer = kind(
                BatchNormClassifier(), args, train_dataset=Stream(), optimizer_cls_and_kwargs=optimizer, **config
            )
            trainer.train()
            weights.append(weights_of(trainer.model))
        assert torch.equal(*weights)
        assert not torch.equal(weights[0], weights_of(BatchNormClassifier()))

    def check(self, build, batch, folder, config, trainer_class):
        settings = {"trainer_class": trainer_class, "num_train_epochs": 4}
        whole = run(build(), batch, folder, config, per_device_train_batch_size=16, **settings)
        parts = run(build(), batch, folder, config, gradient_accumulation_steps=4, **settings)
        assert whole.state.global_step == parts.state.global_step == 4
        tolerance = 1e-9 if config.hvp != "finite_difference" else 1e-6
        torch.testing.assert_close(weights_of(parts.model), weights_of(whole.model), rtol=0, atol=tolerance)


class TestRestore:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
    def test_weights_come_back_bit_for_bit(self, tmp_path, dtype, hvp):
        recorder = WeightRecorder()
        config = XSAMConfig(rho=0.5, hvp=hvp, eigen_interval=1)
        trainer = run(bert().to(dtype), sentences(), tmp_path, config, callbacks=[recorder])
        assert len(recorder.before) == 8
        for before, after in zip(recorder.before, recorder.after_gradient, strict=True):
            assert torch.equal(before, after)
        assert logs_of(trainer)[0]["xsam/sharpness"] != 0

    @pytest.mark.parametrize("absent_in", [1, 2])
    def test_of_a_parameter_without_gradient_in_one_pass(self, tmp_path, absent_in):
        class Switching(BatchNormClassifier):
            calls = 0

            def forward(self, x, labels):
                type(self).calls += 1
                loss = super().forward(x, labels)["loss"]
                return {"loss": loss if type(self).calls % 2 == absent_in % 2 else loss + self.unused.weight.sum()}

        Switching.calls = 0
        recorder = WeightRecorder()
        run(Switching(), points(), tmp_path, XSAMConfig(rho=0.5, alpha=0.0), callbacks=[recorder])
        for before, after in zip(recorder.before, recorder.after_gradient, strict=True):
            assert torch.equal(before, after)

    @pytest.mark.parametrize("failing_call", [2, 3, 7])
    @pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
    def test_after_an_exception_in_a_replay(self, tmp_path, error, failing_call):
        class Failing(BatchNormClassifier):
            calls = 0

            def forward(self, x, labels):
                self.calls += 1
                if self.calls == failing_call:
                    raise error
                return super().forward(x, labels)

        model = Failing()
        before = weights_of(model)
        config = XSAMConfig(rho=0.5, hvp="finite_difference", power_iterations=5)
        settings = {"optimizer": "SGD", "callbacks": [recorder := WeightRecorder()]}
        with pytest.raises(type(error)):
            run(model, points(), tmp_path, config, **settings)
        assert torch.equal(weights_of(model), recorder.before[-1])
        assert len(recorder.before) > 1 or torch.equal(before, weights_of(model))


class TestEigenvector:
    def test_schedule_and_logs(self, tmp_path):
        config = XSAMConfig(eigen_start_step=2, eigen_interval=3, eigen_warmup_steps=0)
        trainer = run(bert(), sentences(), tmp_path, config)
        values = [log.get("xsam/rayleigh_quotient") for log in logs_of(trainer)]
        assert values[:2] == [None, None]
        assert values[2] == values[3] == values[4] != values[5] == values[6] == values[7]
        assert trainer.xsam_state.step == 8
        assert trainer.xsam_state.spectrum.eigenvalue.item() == pytest.approx(values[-1])  # a mean over refreshes
        state = trainer.xsam_state.eigenvector
        assert list(state) == [name for name, _ in trainer.model.named_parameters()]
        assert math.sqrt(sum(part.square().sum().item() for part in state.values())) == pytest.approx(1, abs=1e-5)
        last = logs_of(trainer)[-1]
        assert last["xsam/angle_degrees"] == pytest.approx(math.degrees(math.acos(last["xsam/cosine"])), abs=1e-3)
        assert last["xsam/sharpness"] == pytest.approx(last["xsam/perturbed_loss"] - last["loss"], abs=1e-4)

    def test_before_the_first_refresh_the_step_is_sam(self, tmp_path):
        late = run(bert(), sentences(), tmp_path, XSAMConfig(eigen_start_step=100))
        sam = run(bert(), sentences(), tmp_path, XSAMConfig(alpha=0.0), max_grad_norm=1e6)
        assert torch.equal(weights_of(late.model), weights_of(sam.model))
        assert late.xsam_state.eigenvector is None
        log = logs_of(sam)[0]
        assert log["grad_norm"] == pytest.approx(log["xsam/perturbed_gradient_norm"])

    def test_logs_are_averaged_between_logging_steps(self, tmp_path):
        each = logs_of(run(bert(), sentences(), tmp_path, XSAMConfig()))
        fourth = logs_of(run(bert(), sentences(), tmp_path, XSAMConfig(), logging_steps=4))
        for name in ("xsam/rayleigh_quotient", "xsam/cosine", "xsam/perturbed_loss", "xsam/gradient_norm"):
            assert fourth[0][name] == pytest.approx(sum(log[name] for log in each[:4]) / 4, rel=1e-5)
            assert fourth[1][name] == pytest.approx(sum(log[name] for log in each[4:]) / 4, rel=1e-5)

    def test_a_line_of_the_log_is_short_unless_all_is_asked_for(self, tmp_path):
        def logged(**config):
            trainer = XSAMTrainer(
                model=bert(),
                args=arguments(tmp_path, max_steps=2),
                train_dataset=examples_of(sentences()),
                xsam_config={"alpha": 0.1, **config},
            )
            trainer.train()
            assert trainer.xsam_config == XSAMConfig(alpha=0.1, **config)
            return [{name for name in log if name.startswith("xsam/")} for log in logs_of(trainer)]

        summary = {"xsam/rayleigh_quotient", "xsam/angle_degrees", "xsam/sharpness"}
        assert logged() == [summary] * 2
        (first, second) = logged(log_metrics="all")
        assert first == second > summary | {"xsam/gradient_norm", "xsam/cosine", "xsam/skipped_steps"}

    def test_warm_start_of_wrong_names_or_shape_is_refused(self, tmp_path):
        trainer = XSAMTrainer(
            model=BatchNormClassifier(), args=arguments(tmp_path), train_dataset=examples_of(points())
        )
        trainer.xsam_state.eigenvector = {"nothing": torch.ones(2)}
        with pytest.raises(ValueError, match="eigenvector names 'nothing'"):
            trainer.train()
        trainer.xsam_state.eigenvector = {"layers.0.weight": torch.ones(2)}
        with pytest.raises(ValueError, match=r"layers\.0\.weight.* shape \(2,\).*\(8, 6\)"):
            trainer.train()

    def test_scope(self, tmp_path):
        config = XSAMConfig(eigen_scope=r"encoder\.layer\.1\.", alpha=1.0)
        trainer = run(bert(), sentences(), tmp_path, config)
        names = list(trainer.xsam_state.eigenvector)
        assert names == [n for n, _ in trainer.model.named_parameters() if "encoder.layer.1." in n]

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_auto_says_once_which_product_and_why(self, tmp_path, caplog, use_reentrant):
        caplog.set_level(logging.INFO, "hf_xsam")
        trainer = XSAMTrainer(
            model=bert(),
            args=arguments(
                tmp_path,
                gradient_checkpointing=use_reentrant,
                gradient_checkpointing_kwargs={"use_reentrant": True} if use_reentrant else None,
            ),
            train_dataset=examples_of(sentences()),
            xsam_config=XSAMConfig(),
        )
        trainer.train()
        said = [record.getMessage() for record in caplog.records if "hvp=" in record.getMessage()]
        assert len(said) == 1
        expected = "hvp='finite_difference': gradient checkpointing has a second derivative only with"
        assert (expected if use_reentrant else "hvp='exact'") in said[0]

    def test_a_measurement_before_training_leaves_the_choice_open(self, tmp_path):
        """In evaluation mode nothing is checkpointed, and exact products go well."""
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        args = arguments(tmp_path, **settings)
        data = examples_of(sentences())
        trainer = XSAMTrainer(bert(), args, train_dataset=data, xsam_config=XSAMConfig(eigen_interval=1))
        trainer.top_eigenpair([sentences(4)], iterations=1)
        trainer.train()
        assert trainer._xsam_steps.method == "finite_difference"

    def test_each_training_chooses_anew(self, tmp_path):
        trainer = run(bert(), sentences(), tmp_path, XSAMConfig(), max_steps=2)
        assert trainer._xsam_steps.method == "exact"
        trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
        trainer.train()
        assert trainer._xsam_steps.method == "finite_difference"

    @pytest.mark.parametrize(
        ("batches", "iterations", "message"),
        [
            ([], 2, "batches is list of 0"),
            (sentences(4), 2, "batches is dict of"),
            ([sentences(4)], 0, "iterations is 0"),
        ],
    )
    def test_top_eigenpair_of_nothing(self, tmp_path, batches, iterations, message):
        with pytest.raises(ValueError, match=message):
            XSAMTrainer(bert(), arguments(tmp_path)).top_eigenpair(batches, iterations)

    def test_top_eigenpair_matches_lanczos(self, tmp_path):
        trainer = run(bert().double(), sentences(), tmp_path, XSAMConfig(alpha=0.0))
        batch = sentences()
        halves = [{k: v[:8] for k, v in batch.items()}, {k: v[8:] for k, v in batch.items()}]
        before, (vector, value, residual) = (trainer.top_eigenpair(halves, iterations) for iterations in (29, 30))
        trainer.model.eval()
        parameters = list(trainer.model.parameters())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradient = torch.autograd.grad(trainer.model(**batch).loss, parameters, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradient])

        def product(vector):
            parts = torch.autograd.grad(flat, parameters, torch.as_tensor(vector).flatten(), retain_graph=True)
            return torch.cat([part.flatten() for part in parts]).numpy()

        from scipy.sparse.linalg import LinearOperator, eigsh

        (top,), vectors = eigsh(LinearOperator((len(flat),) * 2, matvec=product, dtype=float), k=1, which="LA")
        names = [name for name, _ in trainer.model.named_parameters()]
        ours, start = (torch.cat([v[name].flatten() for name in names]).numpy() for v in (vector, before.eigenvector))
        assert value == pytest.approx(top, rel=0.01)
        assert abs(ours @ vectors[:, 0]) > 0.999
        assert residual == pytest.approx(np.linalg.norm(product(start) - value * start) / value, rel=1e-3)


class TestTrainerFeatures:
    def test_frozen_parameters_stay(self, tmp_path):
        model = bert()
        model.bert.embeddings.requires_grad_(False)
        before = weights_of(model.bert.embeddings)
        trainer = run(model, sentences(), tmp_path, XSAMConfig(rho=0.5))
        assert torch.equal(weights_of(model.bert.embeddings), before)
        assert not any("embeddings" in name for name in trainer.xsam_state.eigenvector)

    def test_tied_weights_stay_tied(self, tmp_path):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
        trainer = run(model, padded_text(), tmp_path, XSAMConfig(rho=0.1))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in trainer.xsam_state.eigenvector

    def test_batch_norm_moves_once_a_step(self, tmp_path):
        model = BatchNormClassifier()
        config = XSAMConfig(rho=0.5, eigen_interval=1)
        run(model, points(), tmp_path, config, num_train_epochs=1, gradient_accumulation_steps=2)
        norm = model.layers[1]
        assert norm.num_batches_tracked == 4
        stock = BatchNormClassifier()
        run(stock, points(), tmp_path, num_train_epochs=1, max_steps=1)
        once = BatchNormClassifier()
        run(once, points(), tmp_path, config, num_train_epochs=1, max_steps=1)
        assert torch.equal(once.layers[1].running_mean, stock.layers[1].running_mean)
        assert torch.equal(once.layers[1].running_var, stock.layers[1].running_var)

    def test_parameters_without_gradient_are_left_alone(self, tmp_path):
        model = BatchNormClassifier()
        before = weights_of(model.unused)
        run(model, points(), tmp_path, XSAMConfig(), optimizer="AdamW")
        assert model.unused.weight.grad is None
        assert torch.equal(weights_of(model.unused), before)

    def test_model_init_starts_afresh(self, tmp_path):
        trainer = run(None, sentences(), tmp_path, XSAMConfig(), model_init=lambda: bert())
        first = weights_of(trainer.model)
        trainer.train()
        assert torch.equal(weights_of(trainer.model), first)

    def test_model_init_counts_skipped_steps_afresh(self, tmp_path):
        nothing = {"x": torch.full((8, 6), torch.nan), "labels": torch.zeros(8, dtype=torch.long)}
        sam = XSAMConfig(alpha=0.0)
        trainer = run(None, nothing, tmp_path, sam, model_init=BatchNormClassifier, num_train_epochs=1)
        assert trainer.xsam_state.skipped_steps == 2
        trainer.train()
        assert trainer.xsam_state.skipped_steps == 2

    def test_label_smoothing(self, tmp_path):
        settings = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}
        stock = run(bert(), sentences(), tmp_path, **settings)
        ours = run(bert(), sentences(), tmp_path, XSAMConfig(**PLAIN), **settings)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))
        unsmoothed = run(bert(), sentences(), tmp_path, XSAMConfig(), gradient_accumulation_steps=2)
        smoothed = run(bert(), sentences(), tmp_path, XSAMConfig(), **settings)
        assert smoothed.xsam_state.eigenvalue != unsmoothed.xsam_state.eigenvalue

    def test_compute_loss_func(self, tmp_path):
        def twice(outputs, labels, num_items_in_batch=None):
            return 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

        settings = {"compute_loss_func": twice, "gradient_accumulation_steps": 2}
        stock = run(bert(), sentences(), tmp_path, **settings)
        ours = run(bert(), sentences(), tmp_path, XSAMConfig(**PLAIN), **settings)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))
        doubled = run(bert().double(), sentences(), tmp_path, XSAMConfig(), **settings, max_steps=1)
        plain = run(
            bert().double(),
            sentences(),
            tmp_path,
            XSAMConfig(),
            MeanLossTrainer,
            gradient_accumulation_steps=2,
            max_steps=1,
        )
        assert doubled.xsam_state.eigenvalue.item() == pytest.approx(2 * plain.xsam_state.eigenvalue.item(), rel=1e-9)

    # In float32 the backward pass computes attention again, with a fused kernel if nothing asks for the math one.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_non_reentrant_gradient_checkpointing(self, tmp_path, accumulation, dtype, tolerance):
        config = XSAMConfig(hvp="exact")
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        usual = {"gradient_accumulation_steps": accumulation}
        plain = run(bert(0.1).to(dtype), sentences(), tmp_path, config, **usual)
        saving = run(bert(0.1).to(dtype), sentences(), tmp_path, config, **usual, **settings)
        torch.testing.assert_close(weights_of(saving.model), weights_of(plain.model), rtol=0, atol=tolerance)

    def test_evaluation_during_training(self, tmp_path):
        trainer = XSAMTrainer(
            model=bert(0.1),
            args=arguments(tmp_path, eval_strategy="steps", eval_steps=1),
            train_dataset=examples_of(sentences()),
            eval_dataset=examples_of(sentences(8)),
        )
        trainer.train()
        evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
        assert len(evaluations) == 8
        assert not any(name.startswith("xsam/") for line in evaluations for name in line)

    def test_mixin_in_front_of_any_trainer(self, tmp_path):
        class Doubling(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                return (2 * result[0], result[1]) if return_outputs else 2 * result

        class DoublingXSAM(XSAMTrainerMixin, Doubling):
            pass

        stock = run(bert(), sentences(), tmp_path, trainer_class=Doubling)
        ours = run(bert(), sentences(), tmp_path, XSAMConfig(**PLAIN), DoublingXSAM)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))

    @pytest.mark.parametrize("fraction", [0.5, 1.0])
    def test_batches_that_are_no_mappings(self, tmp_path, fraction):
        class Pairs(XSAMTrainer):
            def compute_loss(self, model, inputs, **kwargs):
                return model(*inputs)["loss"]

        def collate(rows):
            return torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])

        def trained(kind, **settings):
            config = XSAMConfig(eigen_interval=1, eigen_batch_fraction=fraction)
            args = arguments(tmp_path)
            data = examples_of(points())
            trainer = kind(BatchNormClassifier(), args, train_dataset=data, xsam_config=config, **settings)
            trainer.train()
            return weights_of(trainer.model)

        weights = trained(Pairs, data_collator=collate)
        assert weights.isfinite().all()
        assert torch.equal(weights, trained(XSAMTrainer)) == (fraction == 1)  # a tuple is not split

    def test_what_the_loss_logs_is_logged_once_a_step(self, tmp_path):
        class Logging(Trainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                self.log({"part": loss.item()})
                return loss

        class LoggingXSAM(XSAMTrainerMixin, Logging):
            pass

        def parts(trainer):
            return [(line["step"], line["part"]) for line in trainer.state.log_history if "part" in line]

        settings = {"num_train_epochs": 1, "max_steps": 2}
        stock = run(bert(), sentences(), tmp_path, trainer_class=Logging, **settings)
        config = XSAMConfig(eigen_interval=1)
        ours = run(bert(), sentences(), tmp_path, config, LoggingXSAM, **settings)
        assert [step for step, _ in parts(ours)] == [step for step, _ in parts(stock)] == [0, 1]
        assert parts(ours)[0] == parts(stock)[0]

    def test_rho_warmup(self, tmp_path):
        trainer = run(bert(), sentences(), tmp_path, XSAMConfig(rho=0.5, rho_warmup_steps=4, alpha=0.0))
        sharpness = [log["xsam/sharpness"] for log in logs_of(trainer)]
        assert sharpness[0] == 0
        assert 0 < sharpness[1] < sharpness[3]

    def test_a_large_rho_is_named_once(self, tmp_path, caplog):
        run(bert(), sentences(), tmp_path, XSAMConfig(rho=20.0, alpha=0.0), max_steps=45, logging_steps=5)
        warnings = [record.getMessage() for record in caplog.records if "lower rho (it is 20)" in record.getMessage()]
        assert len(warnings) == 1

    def test_only_a_large_rho_is_named(self, caplog):
        advice = Advice(XSAMConfig(rho=0.3))
        # Of the loss, 2: not large, then for 16 steps and not for the next, then for 16 steps, and more.
        for sharpness in (0.9, 0.9, 0.9, 1.1, 1.1, 0.9, 1.1, 1.1):
            advice.read({"loss": 2.0, "xsam/sharpness": sharpness, "xsam/perturbed_loss": 2 + sharpness}, 8)
            assert not caplog.records
        for _ in range(5):
            advice.read({"loss": 2.0, "xsam/sharpness": 1.1, "xsam/perturbed_loss": 3.1}, 8)
        (record,) = caplog.records
        assert "more than 1.5 times the loss for 24 steps (last: 3.1 and 2)" in record.getMessage()

    def test_a_large_rho_is_named_in_the_first_log_of_many_steps(self, caplog):
        Advice(XSAMConfig(rho=0.3)).read({"loss": 2.0, "xsam/sharpness": 1.1, "xsam/perturbed_loss": 3.1}, 500)
        assert "for 500 steps" in caplog.text


class TestTryingAgainWithSmallerBatches:
    """`auto_find_batch_size`: memory that runs out between two micro-batches leaves nothing to the next attempt."""

    class OutOfMemory(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.train_batch_size >= 8 and state.global_step == 1:
                raise RuntimeError("CUDA out of memory.")

    def test_equals_stock(self, tmp_path):
        settings = {
            "auto_find_batch_size": True,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "logging_steps": 3,
            "callbacks": [self.OutOfMemory()],
        }
        stock = run(Smooth(), points(64), tmp_path, **settings)
        ours = run(Smooth(), points(64), tmp_path, XSAMConfig(**PLAIN), **settings)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))
        assert logs_of(ours)[0]["xsam/perturbed_loss"] == pytest.approx(logs_of(ours)[0]["loss"], rel=1e-5)
        assert ours.xsam_state.step == 3


class TestGradScaler:
    """Accelerate refuses fp16 on the CPU, so the scaler is put in by hand; its arithmetic is the real one."""

    class ScaledTrainer(XSAMTrainer):
        def create_optimizer(self, *args, **kwargs):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            self.accelerator.scaler = scaler
            # What Accelerate does before it clips, under fp16 alone.
            self.accelerator.unscale_gradients = lambda: scaler.unscale_(self.optimizer.optimizer)
            return super().create_optimizer(*args, **kwargs)

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    @pytest.mark.parametrize("correction", ["paper", "aligned"])
    @pytest.mark.parametrize("normalize_gradient", [True, False])
    def test_scaling_changes_nothing(self, tmp_path, hvp, correction, normalize_gradient):
        config = XSAMConfig(correction=correction, normalize_gradient=normalize_gradient, hvp=hvp)
        plain = run(bert().double(), sentences(), tmp_path, config, max_grad_norm=0.3)
        scaled = run(bert().double(), sentences(), tmp_path, config, self.ScaledTrainer, max_grad_norm=0.3)
        assert scaled.accelerator.scaler.get_scale() == 2.0**10
        torch.testing.assert_close(weights_of(scaled.model), weights_of(plain.model), rtol=0, atol=1e-6)
        for ours, theirs in zip(logs_of(scaled), logs_of(plain), strict=True):
            for name in ("grad_norm", "xsam/gradient_norm", "xsam/perturbed_gradient_norm", "xsam/rayleigh_quotient"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


class TestRefusals:
    def build(self, folder, model=None, config=None, **settings):
        optimizers = settings.pop("optimizers", (None, None))
        return XSAMTrainer(
            model=model or bert(), args=arguments(folder, **settings), xsam_config=config, optimizers=optimizers
        )

    @pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
    def test_optimizers_that_step_inside_backward(self, tmp_path, optim):
        with pytest.raises(
            ValueError, match=f"optim='{optim}' updates the weights inside the backward pass.*adamw_torch"
        ):
            self.build(tmp_path, optim=optim, optim_target_modules=["query"])

    def test_data_parallel(self, tmp_path):
        args = arguments(tmp_path)
        args._n_gpu = 2
        with pytest.raises(ValueError, match="DataParallel.*2 GPUs.*accelerate launch"):
            XSAMTrainer(model=bert(), args=args)

    @pytest.mark.parametrize(
        ("attribute", "value", "message"),
        [
            ("is_distributed_loading_by_transformers", True, "from_pretrained sharded.*let the Trainer shard it"),
        ],
    )
    def test_sharding_by_others(self, tmp_path, attribute, value, message):
        class Sharded(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                setattr(self, attribute, value)

        class ShardedXSAM(XSAMTrainerMixin, Sharded):
            pass

        with pytest.raises(ValueError, match=message):
            ShardedXSAM(model=bert(), args=arguments(tmp_path))

    @pytest.mark.parametrize(
        ("version", "config", "message"),
        [
            (1, {}, "does not support FSDP1.*fsdp_config={'version': 2}"),
            (2, {"hvp": "exact"}, "hvp is 'exact'.*finite_difference"),
            (2, {"ascent": "local"}, "ascent is 'local'.*ascent='global'"),
            (2, {"rho": 0.01}, "offloads to the CPU: set fsdp_offload_params to false"),
        ],
    )
    def test_under_fsdp(self, tmp_path, version, config, message):
        class Sharded(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.is_fsdp_enabled = True
                offload = CPUOffloadPolicy() if "offloads" in message else OffloadPolicy()
                self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=version, cpu_offload=offload)

        class ShardedXSAM(XSAMTrainerMixin, Sharded):
            pass

        with pytest.raises(ValueError, match=message):
            ShardedXSAM(model=bert(), args=arguments(tmp_path), xsam_config=XSAMConfig(**config))

    @pytest.mark.skipif(
        not hasattr(Accelerator, "parallelism_config"), reason="older Accelerate has data parallelism only"
    )
    @pytest.mark.parametrize("dimension", ["tp_size", "cp_size", "sp_size"])
    def test_other_parallelism_than_of_data(self, tmp_path, dimension):
        class Parallel(Trainer):
            def create_accelerator_and_postprocess(self):
                super().create_accelerator_and_postprocess()
                self.accelerator.state.parallelism_config = SimpleNamespace(sp_backend=None, **{dimension: 2})

        class ParallelXSAM(XSAMTrainerMixin, Parallel):
            pass

        with pytest.raises(ValueError, match=f"does not support {dimension} > 1.*dp_shard_size"):
            ParallelXSAM(model=bert(), args=arguments(tmp_path))

    def test_parameters_outside_the_model(self, tmp_path):
        class WithAHead(XSAMTrainer):
            def create_optimizer(self, *args, **kwargs):
                self.optimizer = torch.optim.SGD([*self.model.parameters(), torch.nn.Parameter(torch.ones(3, 2))])
                return super().create_optimizer(*args, **kwargs)

        with pytest.raises(
            ValueError, match=r"trains 1 parameters that do not belong to the model, the first of shape \(3, 2\)"
        ):
            WithAHead(model=bert(), args=arguments(tmp_path), train_dataset=examples_of(sentences())).train()

    def test_an_optimizer_that_steps_within_the_backward_pass(self, tmp_path):
        class Lomo(torch.optim.SGD):
            """By its name."""

        class SetsItsOwn(XSAMTrainer):
            def create_optimizer(self):
                Trainer.create_optimizer(self)

        def made_by(kind=XSAMTrainer, **settings):
            return kind(bert(), arguments(tmp_path), train_dataset=examples_of(sentences()), **settings)

        message = "Lomo updates the weights inside the backward pass"
        with pytest.raises(ValueError, match=message):
            made_by(optimizer_cls_and_kwargs=(Lomo, {"lr": 0.1})).train()
        model = bert()
        with pytest.raises(ValueError, match=message):
            XSAMTrainer(model, arguments(tmp_path), optimizers=(Lomo(model.parameters(), lr=0.1), None))
        assert made_by(SetsItsOwn).train().global_step == 8

    def test_sparse_gradients(self, tmp_path):
        class Sparse(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(50, 2, sparse=True)

            def forward(self, input_ids, labels):
                return {"loss": nn.functional.cross_entropy(self.table(input_ids).mean(1), labels)}

        with pytest.raises(ValueError, match="dense gradients.*sparse=False"):
            run(Sparse(), sentences(), tmp_path, XSAMConfig())

    @pytest.mark.parametrize("scope", ["lora", "no_such_layer"])
    def test_scope_that_matches_nothing(self, tmp_path, scope):
        with pytest.raises(ValueError, match=f"eigen_scope is '{scope}'.*bert.embeddings.word_embeddings.weight"):
            self.build(tmp_path, config=XSAMConfig(eigen_scope=scope))

    def test_a_frozen_model_evaluates_and_does_not_train(self, tmp_path):
        data = examples_of(sentences())
        trainer = XSAMTrainer(bert().requires_grad_(False), arguments(tmp_path), train_dataset=data, eval_dataset=data)
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        with pytest.raises(ValueError, match="perturb_scope is 'trainable', but the model has no trainable parameter"):
            trainer.train()

    def test_config_of_another_type(self, tmp_path):
        with pytest.raises(TypeError, match="xsam_config is a float; it must be an XSAMConfig or a dict"):
            self.build(tmp_path, config=0.1)
        with pytest.raises(ValueError, match="XSAMConfig has no field radius; its fields are rho, "):
            self.build(tmp_path, config={"radius": 0.1})

    def test_exact_products_where_there_are_none(self, tmp_path):
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        with pytest.raises(RuntimeError, match="hvp is 'exact'.*use_reentrant.*finite_difference"):
            run(bert(), sentences(), tmp_path, XSAMConfig(hvp="exact"), **settings)


def test_seq2seq(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    def t5():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        )

    def weights(trainer_class, **settings):
        args = Seq2SeqTrainingArguments(**{**arguments(tmp_path).to_dict(), "output_dir": str(tmp_path)})
        trainer = trainer_class(model=t5(), args=args, train_dataset=examples_of(batch), **settings)
        trainer.train()
        return weights_of(trainer.model)

    batch = {"input_ids": sentences()["input_ids"], "labels": sentences(seed=2)["input_ids"]}
    assert torch.equal(weights(Seq2SeqTrainer), weights(XSAMSeq2SeqTrainer, xsam_config=XSAMConfig(**PLAIN)))
    assert not torch.equal(weights(Seq2SeqTrainer), weights(XSAMSeq2SeqTrainer, xsam_config=XSAMConfig()))

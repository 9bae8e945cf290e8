"""One pass a step, at w + s * rho * v, and `start_step`, before which the steps are the stock Trainer's."""

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_xsam import XSAMConfig, XSAMTrainer
from tests.helpers import WeightRecorder, arguments, examples_of, logs_of, run, weights_of
from tests.models import (
    BatchNormClassifier,
    MeanLossTrainer,
    Smooth,
    adapted,
    bert,
    llama,
    padded_text,
    points,
    sentences,
)

EXACT = {"eigen_interval": 2, "eigen_warmup_steps": 0, "eigen_batch_fraction": 1.0, "hvp": "exact"}


def counting(model, passes):
    """Have `passes` grow by one for each forward pass that is differentiated."""
    model.register_forward_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
    return model


class TestOnePass:
    @pytest.mark.parametrize("build", [lambda: bert(0.1), BatchNormClassifier])
    def test_without_a_radius_it_is_the_stock_run(self, tmp_path, build):
        batch = points() if build is BatchNormClassifier else sentences()
        stock = run(build(), batch, tmp_path, gradient_accumulation_steps=2)
        ours = run(build(), batch, tmp_path, XSAMConfig.one_pass(0.0), gradient_accumulation_steps=2)
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))
        for one, other in zip(ours.model.buffers(), stock.model.buffers(), strict=True):
            assert torch.equal(one, other)
        for line, expected in zip(logs_of(ours), logs_of(stock), strict=True):
            assert {name: line[name] for name in expected} == expected

    def test_the_gradient_is_the_one_at_the_perturbed_weights_and_the_weights_are_back(self, tmp_path):
        """Steps by hand, with v as the trainer found it at each."""
        recorder, seen = WeightRecorder(), []

        class Watching(XSAMTrainer):
            def training_step(self, model, inputs, *args):
                vector = self.xsam_state.eigenvector
                known = vector and torch.cat([part.flatten() for part in vector.values()])
                batch = {name: value.clone() for name, value in inputs.items()}
                super().training_step(model, inputs, *args)
                gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
                seen.append((known, batch, weights_of(model), gradient))
                return torch.zeros(())

        config = XSAMConfig.one_pass(0.3, **EXACT)
        run(Smooth().double(), double(points()), tmp_path, config, Watching, callbacks=[recorder])
        for before, after in zip(recorder.before, recorder.after_gradient, strict=True):
            assert torch.equal(before, after)
        assert seen[0][0] is None
        model = Smooth().double()
        for step, (vector, batch, weights, gradient) in enumerate(seen):
            sign = 1 if (step + step // 2) % 2 == 0 else -1  # the turns change at each refresh
            there = weights if vector is None else weights + sign * 0.3 * vector
            torch.nn.utils.vector_to_parameters(there, model.parameters())
            expected = torch.autograd.grad(model(**batch)["loss"], list(model.parameters()))
            expected = torch.cat([part.flatten() for part in expected])
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("interval", [1, 2, 3, 4, 5, 10])
    def test_both_sides_have_equal_shares_of_all_steps_and_of_those_that_refresh(self, tmp_path, interval):
        sides = []

        class Recording(XSAMTrainer):
            def training_step(self, *args, **kwargs):
                sides.append(self.xsam_config.signed_rho_at(self.state.global_step))
                return super().training_step(*args, **kwargs)

        config = XSAMConfig.one_pass(0.5, eigen_interval=interval, replay_check="never")
        settings = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "logging_steps": 1000}
        run(Smooth(), points(4 * interval), tmp_path, config, Recording, **settings)
        assert len(sides) == 4 * interval
        assert sum(sides) == 0
        assert sum(sides[::interval]) == 0

    def test_a_step_takes_one_pass_but_for_refreshes(self, tmp_path):
        passes = []
        config = XSAMConfig.one_pass(0.1, eigen_interval=4, eigen_warmup_steps=0, replay_check="never")
        trainer = run(
            counting(Smooth(), passes), points(64), tmp_path, config, num_train_epochs=1, logging_steps=16
        )  # fmt: skip
        steps = trainer.state.global_step
        assert steps == 16
        # A refresh, in steps 0, 4, 8 and 12, differentiates a quarter of the batch; choosing the kind of product,
        # once, does so twice more.
        assert len(passes) == steps + 4 + 2

    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_micro_batches_give_the_weights_of_the_whole_batch(self, tmp_path, hvp):
        config = XSAMConfig.one_pass(0.2, alpha=0.3, **{**EXACT, "hvp": hvp})
        whole = run(bert().double(), sentences(), tmp_path, config, MeanLossTrainer, per_device_train_batch_size=16)
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
        parts = run(bert().double(), sentences(), tmp_path, config, MeanLossTrainer, **settings)
        torch.testing.assert_close(weights_of(parts.model), weights_of(whole.model), rtol=0, atol=1e-9)
        assert parts.xsam_state.eigenvalue.item() == pytest.approx(whole.xsam_state.eigenvalue.item(), rel=1e-6)

    def test_tokens_are_counted_over_the_window(self, tmp_path):
        config = XSAMConfig.one_pass(0.2, **EXACT)
        whole = run(llama().double(), padded_text(), tmp_path, config, per_device_train_batch_size=16)
        parts = run(llama().double(), padded_text(), tmp_path, config, gradient_accumulation_steps=4)
        torch.testing.assert_close(weights_of(parts.model), weights_of(whole.model), rtol=0, atol=1e-6)

    def test_both_sides_give_the_product_and_the_mean_gradient(self, tmp_path):
        """Finite differences from w + eps and w - eps: the eigenvalue of exact products, up to rho^2."""
        runs = [
            run(Smooth().double(), double(points()), tmp_path, XSAMConfig.one_pass(0.01, **{**EXACT, "hvp": hvp}))
            for hvp in ("exact", "finite_difference")
        ]
        exact, differences = (trainer.xsam_state for trainer in runs)
        assert differences.eigenvalue.item() == pytest.approx(exact.eigenvalue.item(), rel=1e-3)
        assert runs[1]._xsam_steps.method == "finite_difference"
        torch.testing.assert_close(weights_of(runs[0].model), weights_of(runs[1].model), rtol=0, atol=1e-3)

    def test_a_refresh_by_differences_costs_one_pass(self, tmp_path):
        passes = []
        config = XSAMConfig.one_pass(
            0.1, eigen_interval=4, eigen_warmup_steps=0, replay_check="never", hvp="finite_difference"
        )  # fmt: skip
        trainer = run(counting(Smooth(), passes), points(64), tmp_path, config, num_train_epochs=1)
        assert len(passes) == trainer.state.global_step + 4

    @pytest.mark.parametrize("perturbation", ["eigenvector", "random"])
    def test_resumes(self, tmp_path, perturbation):
        config = XSAMConfig.one_pass(0.2, perturbation=perturbation, eigen_interval=2, eigen_warmup_steps=0)
        settings = {"save_strategy": "steps", "save_steps": 3, "optimizer": "AdamW"}
        whole = run(bert(0.1), sentences(), tmp_path, config, **settings)
        args = arguments(tmp_path, save_strategy="steps", save_steps=3)
        resumed = XSAMTrainer(
            bert(0.1, seed=5), args, train_dataset=examples_of(sentences()), xsam_config=config,
            optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}),
        )  # fmt: skip
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert torch.equal(weights_of(resumed.model), weights_of(whole.model))

    def test_a_random_direction_after_the_eigenvector_logs_none(self, tmp_path):
        saving = {"save_strategy": "steps", "save_steps": 4}
        run(Smooth(), points(), tmp_path, XSAMConfig.one_pass(0.1), **saving)
        args, config = arguments(tmp_path), XSAMConfig.one_pass(1.0, perturbation="random")
        sgd = (torch.optim.SGD, {"lr": 1e-2})
        resumed = XSAMTrainer(
            Smooth(), args, train_dataset=examples_of(points()), xsam_config=config, optimizer_cls_and_kwargs=sgd
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert not any("xsam/" in name for name in logs_of(resumed)[-1])

    def test_adapters_alone_move(self, tmp_path):
        model, recorder = adapted(), WeightRecorder()
        config = XSAMConfig.one_pass(0.3, eigen_scope="lora", eigen_interval=1)
        trainer = run(model, sentences(), tmp_path, config, callbacks=[recorder])
        assert all("lora_" in name for name in trainer.xsam_state.eigenvector)
        assert all(torch.equal(one, other) for one, other in zip(recorder.before, recorder.after_gradient, strict=True))
        assert not torch.equal(weights_of(trainer.model), weights_of(adapted()))

    @pytest.mark.parametrize("failing", [2, 5])
    def test_an_exception_leaves_the_weights(self, tmp_path, failing):
        passes, model, recorder = [], Smooth(), WeightRecorder()

        def fail(*_):
            passes.append(1)
            if len(passes) == failing:
                raise KeyboardInterrupt

        model.register_forward_hook(fail)
        config = XSAMConfig.one_pass(0.5, hvp="finite_difference", replay_check="never")
        with pytest.raises(KeyboardInterrupt):
            run(model, points(), tmp_path, config, callbacks=[recorder])
        assert torch.equal(weights_of(model), recorder.before[-1])

    def test_bfloat16_weights_are_back(self, tmp_path):
        recorder = WeightRecorder()
        run(bert().bfloat16(), sentences(), tmp_path, XSAMConfig.one_pass(0.05), callbacks=[recorder])
        assert all(torch.equal(one, other) for one, other in zip(recorder.before, recorder.after_gradient, strict=True))

    def test_a_gradient_that_is_not_finite_is_skipped(self, tmp_path):
        batch = points()
        batch["x"][0] = math.nan
        trainer = run(Smooth(), batch, tmp_path, XSAMConfig.one_pass(0.1), num_train_epochs=1)
        assert trainer.xsam_state.skipped_steps == 1
        assert torch.isfinite(weights_of(trainer.model)).all()

    @pytest.mark.parametrize("perturbation", ["eigenvector", "random"])
    def test_weights_that_the_pass_moves_itself_are_refused(self, tmp_path, perturbation):
        class Normalized(Smooth):
            def forward(self, x, labels):
                weight = self.layers[2].weight
                weight.data = torch.nn.functional.normalize(weight.data, dim=1)
                return super().forward(x, labels)

        recorder, model = WeightRecorder(), Normalized()
        config = XSAMConfig.one_pass(0.3, perturbation=perturbation)
        with pytest.raises(
            ValueError, match=r"itself changes trainable weights, such as 'layers\.2\.weight'.*'gradient'"
        ):
            run(model, points(), tmp_path, config, callbacks=[recorder])
        assert torch.equal(weights_of(model), recorder.before[-1])

    @pytest.mark.parametrize("perturbation", ["eigenvector", "random"])
    def test_the_radius_is_that_of_what_is_not_frozen(self, tmp_path, perturbation):
        moves, recorder, model = [], WeightRecorder(), Smooth()

        class Freezing(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                model.layers[0].requires_grad_(state.global_step < 2)

        model.register_forward_hook(lambda *_: moves.append(weights_of(model) - recorder.before[-1]))
        config = XSAMConfig.one_pass(
            0.3, perturbation=perturbation, eigen_interval=4, replay_check="never", hvp="exact"
        )
        run(model, points(), tmp_path, config, callbacks=[recorder, Freezing()])
        lengths = torch.stack(moves).norm(dim=1)
        assert lengths[lengths > 0].tolist() == pytest.approx([0.3] * int((lengths > 0).sum()), rel=1e-4)
        assert len(lengths[lengths > 0]) > 4

    @pytest.mark.parametrize(
        ("field", "value"), [("adaptive", True), ("ascent", "local"), ("perturb_scope", "norm"), ("start_step", 1.5)]
    )
    def test_settings_without_a_meaning_are_refused(self, field, value):
        with pytest.raises(ValueError, match=rf"XSAMConfig\.{field} is {value!r}; it must be"):
            XSAMConfig.one_pass(**{field: value})

    @pytest.mark.parametrize(("settings", "times"), [({}, 5), ({"perturbation": "random"}, 40)])
    def test_the_default_radius_is_a_multiple_of_sams(self, settings, times):
        assert XSAMConfig.one_pass(**settings).rho == pytest.approx(times * XSAMConfig().rho)
        assert XSAMConfig.one_pass(0.3, **settings).rho == 0.3


class TestRandomDirection:
    @staticmethod
    def config(rho, **settings):
        return XSAMConfig.one_pass(rho, perturbation="random", **settings)

    def test_without_a_radius_it_is_the_stock_run(self, tmp_path):
        stock, ours = (run(bert(0.1), sentences(), tmp_path, config) for config in (None, self.config(0.0)))
        assert torch.equal(weights_of(ours.model), weights_of(stock.model))

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
    def test_the_weights_move_to_both_sides_in_turn_and_are_back(self, tmp_path, dtype, tolerance):
        moves, recorder, model = [], WeightRecorder(), Smooth().to(dtype)
        model.register_forward_hook(lambda *_: moves.append(weights_of(model) - recorder.before[-1]))
        batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in points().items()}
        config = self.config(0.3, eigen_interval=2, replay_check="never")
        run(model, batch, tmp_path, config, callbacks=[recorder])
        assert len(moves) == len(recorder.before) == 8  # one pass a step
        for before, after in zip(recorder.before, recorder.after_gradient, strict=True):
            assert torch.equal(before, after)
        moves = torch.stack(moves).double() / 0.3
        products = moves @ moves.T
        torch.testing.assert_close(products.diagonal(), torch.ones(8).double(), rtol=0, atol=tolerance)
        torch.testing.assert_close(
            products[range(0, 8, 2), range(1, 8, 2)], -torch.ones(4).double(), rtol=0, atol=tolerance
        )
        assert products[::2, ::2].fill_diagonal_(0).abs().max() < 0.7  # other directions

    def test_micro_batches_give_the_weights_of_the_whole_batch(self, tmp_path):
        config = self.config(0.2)
        whole = run(bert().double(), sentences(), tmp_path, config, MeanLossTrainer, per_device_train_batch_size=16)
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
        parts = run(bert().double(), sentences(), tmp_path, config, MeanLossTrainer, **settings)
        torch.testing.assert_close(weights_of(parts.model), weights_of(whole.model), rtol=0, atol=1e-9)
        assert parts.xsam_state.eigenvector is None

    def test_another_seed_takes_other_directions(self, tmp_path):
        one, other = (
            run(
                Smooth(),
                points(8),
                tmp_path,
                self.config(0.5),
                seed=seed,
                num_train_epochs=1,
                per_device_train_batch_size=8,
            )
            for seed in (0, 1)
        )
        assert not torch.allclose(weights_of(one.model), weights_of(other.model), atol=1e-4)

    def test_a_scope_alone_moves(self, tmp_path):
        model, recorder, moves = adapted(), WeightRecorder(), []
        weight = model.get_parameter("base_model.model.classifier.modules_to_save.default.weight")
        start = weight.detach().clone()
        model.register_forward_pre_hook(lambda *_: moves.append(torch.equal(weight, start)))
        run(model, sentences(), tmp_path, self.config(0.3, perturb_scope="lora"), callbacks=[recorder], max_steps=1)
        assert all(moves)
        assert not torch.equal(weight, start)

    @pytest.mark.parametrize(
        ("field", "value"), [("alpha", 0.2), ("adaptive", True), ("ascent", "local"), ("eigen_scope", "norm")]
    )
    def test_settings_without_a_meaning_are_refused(self, field, value):
        with pytest.raises(ValueError, match=rf"XSAMConfig\.{field} is {value!r}; it must be .* perturbation='random'"):
            self.config(0.1, **{field: value})


class TestStartStep:
    # The step that one pass begins with is the stock's too, for v is not known yet.
    @pytest.mark.parametrize(("preset", "alike"), [(XSAMConfig, 6), (XSAMConfig.one_pass, 7)])
    def test_before_it_the_run_is_the_stock_one(self, tmp_path, preset, alike):
        passes = []
        stock, ours = WeightRecorder(), WeightRecorder()
        run(bert(0.1), sentences(), tmp_path, callbacks=[stock])
        model = counting(bert(0.1), passes)
        trainer = run(model, sentences(), tmp_path, preset(rho=0.1, start_step=5), callbacks=[ours])
        equal = [torch.equal(one, other) for one, other in zip(ours.before, stock.before, strict=True)]
        assert equal == [True] * alike + [False] * (8 - alike)
        assert [line["xsam/active"] for line in logs_of(trainer)] == [0] * 5 + [1] * 3
        assert trainer.xsam_state.refreshed_at is not None

    def test_a_share_of_all_steps(self, tmp_path):
        runs = [run(Smooth(), points(), tmp_path, XSAMConfig(rho=0.1, start_step=start)) for start in (0.5, 4)]
        assert torch.equal(*(weights_of(trainer.model) for trainer in runs))

    def test_steps_before_it_take_one_pass_and_keep_nothing(self, tmp_path):
        passes, copies = [], []

        class Batch(dict):
            def __copy__(self):
                copies.append(1)
                return Batch(self)

        class Giving(XSAMTrainer):
            def training_step(self, model, inputs, *args):
                return super().training_step(model, Batch(inputs), *args)

        run(counting(Smooth(), passes), points(), tmp_path, XSAMConfig(rho=0.1, start_step=100), Giving)
        assert (len(passes), len(copies)) == (8, 0)


def double(batch):
    return {name: column.double() if column.is_floating_point() else column for name, column in batch.items()}


def test_the_mean_over_both_signs_is_the_regularized_loss():
    """(L(w + rho v) + L(w - rho v)) / 2 = L(w) + rho^2 / 2 * lambda + O(rho^4), and so are the gradients."""
    torch.manual_seed(0)
    model, batch = Smooth().double(), double(points())
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(flat):
        parts = flat.split([p.numel() for p in model.parameters()])
        named = {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}
        return torch.func.functional_call(model, named, kwargs=batch)["loss"]

    values, vectors = torch.linalg.eigh(torch.func.hessian(loss)(weights))
    vector, top = vectors[:, -1], values[-1]
    for rho in (0.02, 0.04):
        mean = (loss(weights + rho * vector) + loss(weights - rho * vector)) / 2
        assert (mean - loss(weights)).item() == pytest.approx((rho**2 / 2 * top).item(), rel=rho)

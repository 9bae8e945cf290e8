"""What an eigenvector is estimated from: a part of the step's examples, in evaluation mode, from the gradient."""

from contextlib import suppress

import pytest
import torch

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.eigenvector import first_vector
from hf_xsam.replay import MicroBatch, RandomState, Replay, forward_passes_evaluated
from hf_xsam.tensors import dot, norm

from .helpers import arguments, examples_of, logs_of, run
from .test_trainer import BatchNormClassifier, MeanLossTrainer, bert, llama, padded_text, points, sentences

CONVERGED = {"power_iterations": 300, "eigen_momentum": 0.0, "hvp": "exact", "alpha": 1.0, "rho": 0.1}


def micro_batches(count, rows, **other):
    state = RandomState.capture(torch.device("cpu"))
    loss = torch.zeros(())
    return [
        MicroBatch({"x": torch.full((rows, 3), float(i)), **other}, count * rows * 5, state, loss) for i in range(count)
    ]


class TestPart:
    """`Replay.part`."""

    @pytest.mark.parametrize(
        ("count", "fraction", "expected"),
        [  # (number of the micro-batch, rows, items, weight)
            (1, 1.0, [(0, 8, 40, 1)]),
            (1, 0.25, [(0, 2, 10, 1)]),
            (1, 0.01, [(0, 1, 5, 1)]),
            (1, 0.5, [(0, 2, 10, 0.5)] * 2),
            (1, 0.7, [(0, 2, 10, 1 / 3)] * 3),
            (4, 0.125, [(0, 2, 40, 2)] * 2),
            (4, 0.25, [(0, 2, 40, 1)] * 4),
            (4, 1.0, [(i, 8, 160, 1) for i in range(4)]),
        ],
    )
    def test_takes_whole_micro_batches_or_their_rows(self, count, fraction, expected):
        part = Replay(None, None, None, micro_batches(count, 8)).part(fraction)
        found = [
            (piece.inputs["x"][0, 0].item(), len(piece.inputs["x"]), piece.num_items_in_batch, weight)
            for piece, weight in part
        ]
        assert found == [pytest.approx(values) for values in expected]

    def test_pieces_are_different_rows(self):
        batch = micro_batches(1, 8, row=torch.arange(8))
        part = Replay(None, None, None, batch).part(0.5)
        assert torch.equal(torch.cat([piece.inputs["row"] for piece, _ in part]), torch.arange(4))

    def test_rows_that_are_no_examples_stay_together(self):
        replay = Replay(None, None, None, micro_batches(4, 8))
        assert [(len(piece.inputs["x"]), weight) for piece, weight in replay.part(0.3, False)] == [(8, 2), (8, 2)]

    @pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros(1, 8), "text", None])
    def test_inputs_without_common_rows_stay_whole(self, other):
        ((piece, weight),) = Replay(None, None, None, micro_batches(1, 8, other=other)).part(0.25)
        assert (len(piece.inputs["x"]), piece.num_items_in_batch, weight) == (8, 40, 1)

    @pytest.mark.parametrize("accumulation", [1, 4])
    @pytest.mark.parametrize("fraction", [0.1, 0.7])
    @pytest.mark.parametrize("case", ["mean over each batch", "normalized by all tokens"])
    def test_the_eigenvalue_is_of_the_whole_windows_scale(self, tmp_path, accumulation, fraction, case):
        """All examples are the same one, so any part has the Hessian of the whole."""
        (build, batch, trainer_class) = {
            "mean over each batch": (bert, sentences(), MeanLossTrainer),
            "normalized by all tokens": (llama, padded_text(), XSAMTrainer),
        }[case]
        batch = {name: column[:1].repeat_interleave(16, 0) for name, column in batch.items()}

        def eigenvalue(fraction):
            config = XSAMConfig(**{**CONVERGED, "power_iterations": 3}, eigen_batch_fraction=fraction)
            settings = {"per_device_train_batch_size": 16 // accumulation, "max_steps": 1}
            settings["gradient_accumulation_steps"] = accumulation
            trainer = run(build().double(), batch, tmp_path, config, trainer_class, **settings)
            return trainer.xsam_state.eigenvalue

        torch.testing.assert_close(eigenvalue(fraction), eigenvalue(1.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("build", [lambda: bert(0.3), lambda: BatchNormClassifier()], ids=["dropout", "batch norm"])
def test_products_are_in_evaluation_mode_on_the_first_rows(tmp_path, build):
    batch = sentences() if "Bert" in type(build()).__name__ else points()
    torch.manual_seed(0)
    model = build().double()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    settings = {"args": arguments(tmp_path, max_steps=1, per_device_train_batch_size=16)}
    config = XSAMConfig(**CONVERGED, eigen_batch_fraction=0.25)
    trainer = XSAMTrainer(model=model, train_dataset=examples_of(batch), xsam_config=config, **settings)
    first = {}

    class Watching(XSAMTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            first.update({name: column[:4].clone() for name, column in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    watching = Watching(model=model, train_dataset=examples_of(batch), xsam_config=config, **settings)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    watching.train()
    found = dict(watching.xsam_state.eigenvector), watching.xsam_state.eigenvalue
    model.load_state_dict(start)
    vector, eigenvalue = trainer.top_eigenpair([first], iterations=300)
    assert found[1].item() == pytest.approx(eigenvalue, rel=1e-6)
    assert abs(dot(list(found[0].values()), [vector[name] for name in found[0]]).item()) == pytest.approx(1, abs=1e-6)


class TestForwardPassesEvaluated:
    def test_undoes_what_a_training_step_asks_for_and_leaves_the_modes(self):
        model = bert(0.5)
        model.train()
        model.classifier.eval()
        before = [module.training for module in model.modules()]
        batch = {name: column[:2] for name, column in sentences().items()}
        with suppress(RuntimeError), forward_passes_evaluated(model):
            model.train()
            assert torch.equal(model(**batch).loss, model(**batch).loss)
            raise RuntimeError
        assert [module.training for module in model.modules()] == before
        assert not torch.equal(model(**batch).loss, model(**batch).loss)

    def test_activations_go_on_being_checkpointed(self):
        model = bert(0.5)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        calls = []
        model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
        with forward_passes_evaluated(model):
            loss = model(**sentences()).loss
            again = model(**sentences()).loss
            assert torch.equal(loss, again)
            loss.backward()
        assert len(calls) == 3  # twice forward, and once more in the backward pass


class TestFirstVector:
    def test_leans_on_the_gradient(self):
        gradient = [torch.randn(50, dtype=torch.double), torch.randn(3, 7, dtype=torch.double)]
        vector = first_vector(gradient, seed=0)
        assert norm(vector).item() == pytest.approx(1)
        assert dot(vector, gradient).item() / norm(gradient).item() > 0.97

    def test_leaves_nothing_out(self):
        vector = first_vector([torch.zeros(50), torch.zeros(3, 7)], seed=0)
        assert norm(vector).item() == pytest.approx(1)
        assert all((part != 0).all() for part in vector)


def test_the_first_refresh_finds_the_eigenvector_and_the_later_ones_follow(tmp_path):
    """One iteration each of a run, on all examples: after its first step v is the top eigenvector already."""
    batch = sentences()
    config = XSAMConfig(rho=0.01, alpha=1e-9, eigen_interval=1, eigen_batch_fraction=1.0, hvp="exact")
    settings = {"per_device_train_batch_size": 16, "num_train_epochs": 40, "learning_rate": 1e-3}
    trainer = run(bert().double(), batch, tmp_path, config, MeanLossTrainer, **settings)
    _, eigenvalue = trainer.top_eigenpair([batch], iterations=300)
    assert logs_of(trainer)[-1]["xsam/eigenvalue"] == pytest.approx(eigenvalue, rel=0.05)
    assert logs_of(trainer)[0]["xsam/eigenvalue"] > 0.5 * eigenvalue

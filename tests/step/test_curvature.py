"""What an eigenvector is estimated from: a part of the step's examples, in evaluation mode, from the gradient."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.functional.power_iteration import first_vector
from hf_xsam.functional.tensors import dot, norm
from hf_xsam.step.modes import forward_passes_evaluated
from hf_xsam.step.random_state import RandomState, devices_of
from hf_xsam.step.replay import MicroBatch, Window
from tests.helpers import arguments, examples_of, run
from tests.models import BatchNormClassifier, MeanLossTrainer, bert, llama, padded_text, points, sentences


def micro_batches(count, rows, **other):
    state = RandomState.capture()
    loss = torch.zeros(())
    return [
        MicroBatch({"x": torch.full((rows, 3), float(i)), **other}, count * rows * 5, state, loss, count)
        for i in range(count)
    ]


class TestPart:
    """`Window.part`."""

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
        part = Window(None, None, None, None, micro_batches=micro_batches(count, 8)).part(fraction)
        found = [
            (piece.inputs["x"][0, 0].item(), len(piece.inputs["x"]), piece.num_items_in_batch, weight)
            for piece, weight in part
        ]
        assert found == [pytest.approx(values) for values in expected]

    def test_pieces_are_different_rows(self):
        batch = micro_batches(1, 8, row=torch.arange(8))
        part = Window(None, None, None, None, micro_batches=batch).part(0.5)
        assert torch.equal(torch.cat([piece.inputs["row"] for piece, _ in part]), torch.arange(4))

    def test_rows_that_are_no_examples_stay_together(self):
        window = Window(None, None, None, None, micro_batches=micro_batches(4, 8))
        assert [(len(piece.inputs["x"]), weight) for piece, weight in window.part(0.3, False)] == [(8, 2), (8, 2)]

    @pytest.mark.parametrize(
        "inputs",
        [
            {"input_ids": torch.zeros(8, 3), "pixel_values": torch.zeros(8, 3, 2, 2)},  # 8 images of some of the texts
            {"input_ids": torch.zeros(3, 8), "position_ids": torch.zeros(3, 3, 8)},  # M-RoPE's axes before the texts
            (torch.zeros(8, 3), torch.zeros(8)),
        ],
    )
    def test_inputs_whose_rows_may_be_no_examples_stay_whole(self, inputs):
        batch = MicroBatch(inputs, 40, RandomState.capture(), torch.zeros(()), 1)
        assert batch.pieces(0.25) == [(batch, 1.0)]

    @pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros(1, 8), "text", None])
    def test_inputs_without_common_rows_stay_whole(self, other):
        ((piece, weight),) = Window(None, None, None, None, micro_batches=micro_batches(1, 8, other=other)).part(0.25)
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
            config = XSAMConfig(hvp="exact", eigen_batch_fraction=fraction)
            settings = {"per_device_train_batch_size": 16 // accumulation, "max_steps": 1}
            settings["gradient_accumulation_steps"] = accumulation
            trainer = run(build().double(), batch, tmp_path, config, trainer_class, **settings)
            return trainer.xsam_state.eigenvalue

        # Transformers computes a language model's loss in float32.
        tolerance = 1e-9 if build is bert else 1e-5
        torch.testing.assert_close(eigenvalue(fraction), eigenvalue(1.0), rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("build", "batch"),
    [(lambda: bert(0.3), sentences()), (BatchNormClassifier, points())],
    ids=["dropout", "batch norm"],
)
def test_products_are_in_evaluation_mode_on_the_first_rows(tmp_path, build, batch):
    first = {}

    class Watching(XSAMTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            first.update({name: column[:4].clone() for name, column in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    batch = {name: column.double() if column.is_floating_point() else column for name, column in batch.items()}
    model = build().double()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}
    trainer = Watching(
        model=model,
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=16),
        train_dataset=examples_of(batch),
        xsam_config=XSAMConfig(hvp="exact", eigen_batch_fraction=0.25),
    )
    trainer.xsam_state.eigenvector = direction  # a warm start, so that there is one product: the quotient is <v, H v>
    trainer.train()

    model.load_state_dict(weights, strict=False)  # with batch norm's statistics as the step's first pass left them
    model.eval()
    parameters = list(model.parameters())
    v = [direction[name] / norm(direction.values()) for name in weights]
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(**first)["loss"]
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    along = sum((g * x).sum() for g, x in zip(gradient, v, strict=True) if g is not None)
    product = torch.autograd.grad(along, parameters, allow_unused=True)
    expected = sum((h * x).sum() for h, x in zip(product, v, strict=True) if h is not None)
    assert trainer.xsam_state.eigenvalue.item() == pytest.approx(expected.item(), rel=1e-9)


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


def test_the_first_refreshes_find_the_eigenvector_and_later_ones_follow_it(tmp_path):
    """With one power iteration a refresh, on all examples; an epoch is a step."""
    config = XSAMConfig(rho=0.01, alpha=1e-9, eigen_interval=1, eigen_batch_fraction=1.0, hvp="exact")
    settings = {"per_device_train_batch_size": 16, "learning_rate": 1e-3}

    def eigenvalue_and_measured(epochs):
        trainer = run(
            bert().double(), sentences(), tmp_path, config, MeanLossTrainer, num_train_epochs=epochs, **settings
        )
        return trainer.xsam_state.eigenvalue.item(), trainer.top_eigenpair([sentences()], iterations=200)[1]

    for epochs in (16, 40):
        estimated, measured = eigenvalue_and_measured(epochs)
        assert estimated == pytest.approx(measured, rel=0.1)


def test_random_numbers_of_all_devices_that_a_model_is_spread_over():
    device_map = {"a": 0, "b": "cuda:1", "c": "cpu", "d": "disk", "e": torch.device("cuda:2")}
    found = devices_of(SimpleNamespace(hf_device_map=device_map), torch.device("cuda:0"))
    assert found == {torch.device("cuda", number) for number in range(3)}
    assert devices_of(bert(), torch.device("cpu")) == {torch.device("cpu")}

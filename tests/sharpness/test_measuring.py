"""`measure` against dense Hessians, and that nothing is left of it."""

import json
import math
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from hf_xsam.functional.spectrum import hutchinson_trace, top_eigenpairs
from hf_xsam.sharpness import MeasureSettings, measure
from hf_xsam.step.scope import parameters_in_scope, trainable_parameters
from tests.cases import TRANSFORMERS, tanh_network, tiny_bert, tiny_llama
from tests.helpers import weights_of


def eigenpairs(model, data, compute_loss=None, **settings):
    """Measure the eigenpairs alone."""
    settings = MeasureSettings(**{"trace_samples": 0, "rhos": [], "slice_points": 0} | settings)
    return measure(model, data, settings, compute_loss=compute_loss, progress=False)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def dense(loss_at, parameters):
    """Return the loss, gradient and Hessian at `parameters`, by name, of a function of such parameters."""
    names, sizes = list(parameters), [p.numel() for p in parameters.values()]

    def loss(vector):
        parts = zip(names, vector.split(sizes), strict=True)
        return loss_at({name: part.view_as(parameters[name]) for name, part in parts})

    start = flat(parameters.values())
    with sdpa_kernel(SDPBackend.MATH):
        return loss(start), torch.func.grad(loss)(start), torch.autograd.functional.hessian(loss, start), loss


@pytest.fixture
def problem():
    """A float64 network, uneven batches of its data, its loss, and all of the dense Hessian's."""
    network, _ = tanh_network()
    torch.manual_seed(1)
    x, y = torch.randn(11, 4, dtype=torch.double), torch.randint(0, 3, (11,))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)

    def compute_loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def loss_at(weights):
        return nn.functional.cross_entropy(torch.func.functional_call(network, weights, (x,)), y)

    return network, loader, compute_loss, dense(loss_at, dict(network.named_parameters()))


def check_eigenpairs(sharpness, hessian, top_k, rel):
    values, vectors = torch.linalg.eigh(hessian)
    values, vectors = values.flip(0)[:top_k], vectors.flip(1)[:, :top_k]
    assert sharpness.eigenvalues == pytest.approx(values.tolist(), rel=rel)
    for found, expected in zip(sharpness.eigenvectors, vectors.T, strict=True):
        assert flat(found.values()).norm().item() == pytest.approx(1, abs=1e-6)
        assert abs(flat(found.values()).to(expected) @ expected).item() == pytest.approx(1, abs=math.sqrt(rel))


def test_all_equals_the_dense_hessians(problem):
    network, loader, compute_loss, (loss, gradient, hessian, loss_at) = problem
    settings = MeasureSettings(
        top_k=3, trace_samples=200, rhos=[0.01, 0.3], slice_radius=0.3, slice_points=3, tolerance=1e-12
    )
    found = measure(network, loader, settings, compute_loss=compute_loss, progress=False)
    assert found.loss == pytest.approx(loss.item(), rel=1e-14)
    assert found.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)
    check_eigenpairs(found, hessian, 3, rel=1e-10)
    assert abs(found.trace.mean - hessian.trace().item()) < 4 * found.trace.standard_error
    values, vectors = torch.linalg.eigh(hessian)
    rest = hessian - vectors[:, -3:] @ torch.diag(values[-3:]) @ vectors[:, -3:].T
    off_diagonal = rest - torch.diag(rest.diagonal())
    assert found.trace.standard_error == pytest.approx((2 * off_diagonal.square().sum() / 200).sqrt().item(), rel=0.2)

    here, uphill = flat(p for p in network.parameters()), gradient / gradient.norm()
    for rho, rise in found.sam_sharpness.items():
        assert rise == pytest.approx((loss_at(here + rho * uphill) - loss).item(), abs=1e-14)
    for vector, angle in zip(found.eigenvectors, found.gradient_angles_degrees, strict=True):
        cosine = abs(flat(vector.values()) @ uphill).item()
        assert angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-6)
    top = flat(found.eigenvectors[0].values())
    top = top if top @ gradient > 0 else -top
    for name, direction in (("eigenvector", top), ("gradient", uphill)):
        assert found.slices[name].distances == [-0.3, 0.0, 0.3]
        expected = [loss_at(here + distance * direction).item() for distance in (-0.3, 0.0, 0.3)]
        assert found.slices[name].losses == pytest.approx(expected, abs=1e-13)
    assert found.settings["hvp"] == "exact"
    assert found.settings["targets"] == 11


@pytest.mark.parametrize("tolerance", [1e-2, 1e-8])
def test_residuals_are_those_of_the_dense_hessian(problem, tolerance):
    network, loader, compute_loss, (_, _, hessian, _) = problem
    settings = {"top_k": 2, "tolerance": tolerance}
    found = eigenpairs(network, loader, compute_loss, **settings)
    for value, vector, residual in zip(found.eigenvalues, found.eigenvectors, found.residuals, strict=True):
        v = flat(vector.values())
        assert residual == pytest.approx(((hessian @ v - value * v).norm() / abs(value)).item(), rel=1e-3, abs=1e-12)
        assert residual <= tolerance


def test_largest_algebraically_where_a_negative_one_is_larger():
    matrix = torch.diag(torch.tensor([-9.0, 2.0, 1.0, *[0.0] * 30], dtype=torch.double))
    torch.manual_seed(0)
    start = [torch.randn(3, 11, dtype=torch.double)]
    values, vectors = top_eigenpairs(lambda v: [(matrix @ v[0].flatten()).view(3, 11)], start, 2, 1e-12)
    assert values == pytest.approx([2, 1], abs=1e-10)
    assert abs(vectors[0][0].flatten()[1].item()) == pytest.approx(1, abs=1e-10)


def test_the_trace_of_a_diagonal_matrix_is_exact():
    diagonal = [torch.tensor([3.0, -1.0, 0.5]), torch.tensor([[2.0, 4.0]])]
    trace = hutchinson_trace(lambda v: [d * x for d, x in zip(diagonal, v, strict=True)], diagonal, 5, seed=0)
    assert (trace.mean, trace.standard_error, trace.samples) == (8.5, 0, 5)


def test_known_eigenpairs_are_taken_out_of_the_trace():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 50, dtype=torch.double)).Q
    spectrum = torch.cat([torch.tensor([100.0, 30.0]), torch.full((48,), 0.5)]).double()
    matrix = basis @ torch.diag(spectrum) @ basis.T
    settings = {"product": lambda v: [matrix @ v[0]], "like": [matrix[0]], "samples": 16, "seed": 0}
    known = {"eigenvalues": [100.0, 30.0], "eigenvectors": [[basis[:, 0]], [basis[:, 1]]]}
    plain, less = hutchinson_trace(**settings), hutchinson_trace(**settings, **known)
    assert abs(less.mean - 154) < 4 * less.standard_error
    assert abs(plain.mean - 154) < 4 * plain.standard_error
    assert less.standard_error < plain.standard_error / 20


def test_uneven_batches_count_by_their_examples(problem):
    network, loader, compute_loss, _ = problem
    whole = [next(iter(DataLoader(loader.dataset, batch_size=11)))]
    one, several = (eigenpairs(network, data, compute_loss=compute_loss) for data in (whole, loader))
    assert one.eigenvalues == pytest.approx(several.eigenvalues, rel=1e-10)
    assert one.loss == pytest.approx(several.loss, rel=1e-14)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: {"labels": [{"boxes": row} for row in x], "pixel_values": x},  # as detection models take them
        lambda x: {"weight": torch.tensor(2.0), "labels": x},
    ],
)
def test_batches_of_other_forms_count_by_their_rows(form):
    torch.manual_seed(0)
    network, rows = nn.Linear(6, 1).double(), torch.randn(10, 6, dtype=torch.double)

    def compute_loss(model, batch):
        x = batch if isinstance(batch, torch.Tensor) else batch.get("pixel_values", batch["labels"])
        return model(x).square().mean()

    found = eigenpairs(network, [form(rows[:8]), form(rows[8:])], compute_loss=compute_loss)
    assert found.settings["targets"] == 10
    assert found.loss == pytest.approx(compute_loss(network, rows).item(), rel=1e-12)


def test_language_models_batches_count_by_their_tokens():
    torch.manual_seed(0)
    model, batch = tiny_llama()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:5, :8] = -100
    batch["labels"][5:, 11] = -100
    parts = [{name: column[part] for name, column in batch.items()} for part in (slice(0, 3), slice(3, 8))]
    whole, several = (eigenpairs(model, data) for data in ([batch], parts))
    assert several.loss == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert several.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-4)
    assert several.settings["targets"] == 5 * 4 + 3 * 10


@pytest.mark.parametrize("build", TRANSFORMERS)
def test_transformers_equal_the_dense_hessian_over_a_scope(build):
    torch.manual_seed(0)
    model, batch = build()
    model.eval()
    scope = parameters_in_scope(model, "norm", "eigen_scope")

    def loss_at(weights):
        return torch.func.functional_call(model, weights, (), batch).loss

    _, gradient, hessian, _ = dense(loss_at, scope)
    exact = eigenpairs(model, [batch], top_k=2, eigen_scope="norm", hvp="exact", tolerance=1e-5)
    check_eigenpairs(exact, hessian, 2, rel=1e-4)
    assert exact.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert list(exact.eigenvectors[0]) == list(scope)
    numeric = eigenpairs(model, [batch], top_k=2, eigen_scope="norm", hvp="finite_difference")
    assert numeric.eigenvalues == pytest.approx(exact.eigenvalues, rel=0.02)
    assert numeric.settings["hvp"] == "finite_difference"


def adapted():
    model, batch = tiny_bert()
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, batch


def test_lora_with_its_base_frozen():
    torch.manual_seed(0)
    model, batch = adapted()
    model.eval()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    scope = parameters_in_scope(model, "lora", "eigen_scope")

    def loss_at(weights):
        return torch.func.functional_call(model, weights, (), batch).loss

    hessian = dense(loss_at, scope)[2]
    found = eigenpairs(model, [batch], eigen_scope="lora", tolerance=1e-5)
    check_eigenpairs(found, hessian, 1, rel=1e-3)
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


class Mixed(nn.Module):
    """Everything that a measurement could leave a trace of."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, labels):
        return (self.body(x) * self.frozen - labels).square().mean() + 0 * torch.rand(())


@pytest.mark.parametrize("fails", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_nothing_is_left_of_it(hvp, fails):
    torch.manual_seed(0)
    model = Mixed().train()
    model.body[1].eval()
    batch = {"x": torch.randn(6, 4), "labels": torch.randn(6, 1)}
    model(**batch).backward()
    running = Accelerator(cpu=True, gradient_accumulation_steps=3)
    calls = 0

    def compute_loss(model, batch):
        nonlocal calls
        calls += 1
        if fails is not None and calls == 30:
            assert not torch.equal(weights_of(model), weights)  # while it is moved
            raise fails
        return model(**batch)

    def state():
        modes = [module.training for module in model.modules()]
        shared = [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)]
        return modes, [p.requires_grad for p in model.parameters()], shared

    weights, before = weights_of(model), state()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    generator = torch.get_rng_state()
    settings = MeasureSettings(trace_samples=4, hvp=hvp, slice_points=40)
    options = {"compute_loss": compute_loss, "progress": False}
    if fails is None:
        measure(model, DataLoader([batch], batch_size=None, shuffle=True), settings, **options)
        assert calls > 30
    else:
        with pytest.raises(fails):
            measure(model, [batch], settings, **options)
    assert torch.equal(weights_of(model), weights)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert state() == before
    assert running.gradient_accumulation_steps == 3


def test_the_json_is_what_was_found(problem, tmp_path):
    network, loader, compute_loss, _ = problem
    found = measure(network, loader, compute_loss=compute_loss, progress=False)
    assert found.save(tmp_path) == tmp_path / "sharpness.json"
    content = json.loads((tmp_path / "sharpness.json").read_text())
    assert content == found.to_dict()
    assert list(content) == [
        *("model", "loss", "gradient_norm", "eigenvalues", "residuals", "gradient_angles_degrees", "trace"),
        *("sam_sharpness", "slices", "settings", "versions"),
    ]
    assert set(content["trace"]) == {"mean", "standard_error", "samples"}
    assert set(content["sam_sharpness"]) == {"0.01", "0.05"}
    assert len(content["slices"]["gradient"]["losses"]) == len(content["slices"]["eigenvector"]["distances"]) == 21
    assert content["settings"]["seed"] == 0
    assert content["versions"]["torch"] == version("torch")  # without the tag that torch.__version__ has for CUDA
    bare = eigenpairs(network, loader, compute_loss=compute_loss).save(tmp_path / "new" / "bare.json")
    content = json.loads(bare.read_text())
    assert (content["trace"], content["slices"], content["sam_sharpness"]) == (None, {}, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "^top_k is 0; it must be at least 1.$"),
        ({"top_k": 1.0}, "^top_k is 1.0; it must be an integer.$"),
        ({"trace_samples": 1}, "^trace_samples is 1; it must be 0, or at least 2 for a standard error.$"),
        ({"trace_samples": -2}, "^trace_samples is -2; it must be 0, or at least 2"),
        ({"rhos": [0.1, 0]}, r"^rhos are \[0\.1, 0\]; they must be above 0.$"),
        ({"rhos": [math.nan]}, r"^rhos are \[nan\]; they must be above 0"),
        ({"slice_radius": 0.0}, "^slice_radius is 0.0; it must be above 0.$"),
        ({"slice_points": -1}, "^slice_points is -1; it must be at least 0"),
        ({"tolerance": -1.0}, "^tolerance is -1.0; it must be at least 0"),
        ({"tolerance": math.nan}, "^tolerance is nan; it must be a finite number"),
        ({"hvp": "guess"}, "^hvp is 'guess'; it must be one of 'auto', 'exact', 'finite_difference'.$"),
        ({"eigen_scope": "("}, "^eigen_scope is '\\('; it must be 'trainable', 'lora', 'norm' or a regular"),
    ],
)
def test_settings_that_are_not_allowed_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MeasureSettings(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": MeasureSettings(top_k=43)}, "top_k is 43; the Hessian has 43 rows"),
        ({"settings": MeasureSettings(eigen_scope="lora")}, "eigen_scope is 'lora', which matches no trainable"),
        ({"dataloader": []}, "dataloader has no batches"),
        ({"dataloader": [{"x": [1.0]}]}, "yields a batch without a tensor"),
        ({"compute_loss": None, "dataloader": [{"x": torch.zeros(1)}]}, "batches need `labels`"),
    ],
)
def test_what_does_not_fit_is_named(problem, change, message):
    network, loader, compute_loss, _ = problem
    with pytest.raises(ValueError, match=message):
        measure(network, **{"dataloader": loader, "compute_loss": compute_loss, "progress": False} | change)


class Never(torch.autograd.Function):
    """Does nothing, once: its derivative is an error without a message."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


def test_an_obstacle_without_a_message_is_named_by_its_type(problem):
    network, loader, _, _ = problem

    def compute_loss(model, batch):
        output = model(batch[0])
        if output.requires_grad:
            output.register_hook(Never.apply)  # on its gradient, whose derivative is the second
        return output.square().mean()

    with pytest.raises(RuntimeError, match="the model has no second derivative: NotImplementedError. Use"):
        eigenpairs(network, loader, compute_loss, hvp="exact")


def test_a_loss_that_is_not_finite_is_refused(problem):
    network, loader, compute_loss, _ = problem
    with pytest.raises(ArithmeticError, match="The loss is nan"):
        eigenpairs(network, loader, compute_loss=lambda model, batch: compute_loss(model, batch) * math.nan)


def test_a_loss_without_curvature_is_said():
    model, batches = nn.Linear(3, 1), [torch.randn(5, 3)]
    with pytest.raises(ArithmeticError, match="the loss is linear"):
        eigenpairs(model, batches, compute_loss=lambda model, batch: model(batch).mean())


def test_the_core_needs_no_scipy():
    code = "import sys; sys.modules['scipy'] = None; from hf_xsam import *; import hf_xsam.sharpness"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_compiled_model_is_measured_as_it_was_written():
    torch.manual_seed(0)
    model, batch = tiny_bert()
    plain = eigenpairs(model, [batch])
    compiled = eigenpairs(torch.compile(model), [batch])
    assert compiled.eigenvalues == pytest.approx(plain.eigenvalues, rel=1e-5)
    assert list(compiled.eigenvectors[0]) == list(trainable_parameters(model))

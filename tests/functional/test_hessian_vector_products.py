"""Hessian-vector products against dense Hessians and double backward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_xsam.functional.hessian_vector_products import (
    central_difference,
    exact_hessian_vector_product,
    finite_difference_hessian_vector_product,
    finite_difference_step,
)
from hf_xsam.functional.power_iteration import power_iteration, random_unit_vector
from hf_xsam.functional.tensors import norm, scale
from hf_xsam.step.gradients import gradients
from tests.cases import TRANSFORMERS, tanh_network


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("keep_graph", [True, False])
def test_exact_product_equals_the_dense_hessian(keep_graph):
    network, _ = tanh_network()
    parameters = [*network.parameters(), torch.nn.Parameter(torch.zeros(2, dtype=torch.double))]
    names = [name for name, _ in network.named_parameters()]
    sizes = [p.numel() for p in network.parameters()]
    start = flat([p.detach() for p in network.parameters()])

    x, y = torch.randn(6, 4, dtype=torch.double), torch.randint(0, 3, (6,))

    def data_loss(weights):
        parts = {n: w.view_as(p) for n, w, p in zip(names, weights.split(sizes), network.parameters(), strict=True)}
        return torch.nn.functional.cross_entropy(torch.func.functional_call(network, parts, (x,)), y)

    hessian = torch.func.hessian(data_loss)(start)
    halves = [(x[:2], y[:2], 1 / 3), (x[2:], y[2:], 2 / 3)]

    def losses():
        return (w * torch.nn.functional.cross_entropy(network(a), b) for a, b, w in halves)

    product = exact_hessian_vector_product(losses, parameters, keep_graph)
    for seed in range(3):
        vector = random_unit_vector(parameters, seed)
        result = product(vector)
        torch.testing.assert_close(flat(result[:-1]), hessian @ flat(vector[:-1]), rtol=0, atol=1e-12)
        assert torch.equal(result[-1], torch.zeros(2, dtype=torch.double))


@pytest.mark.parametrize("build", TRANSFORMERS)
@pytest.mark.parametrize("direction", ["gradient", "top", "random"])
def test_finite_difference_agrees_with_exact(build, direction):
    torch.manual_seed(0)
    model, batch = build()
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def losses():
        with sdpa_kernel(SDPBackend.MATH):
            yield model(**batch).loss

    def gradient_here():
        model.zero_grad()
        model(**batch).loss.backward()
        return [g.clone() for g in gradients(parameters)]

    gradient = gradient_here()
    step = finite_difference_step(parameters, torch.float32)
    numeric = finite_difference_hessian_vector_product(gradient_here, parameters, gradient, step)
    vector = random_unit_vector(parameters, 0)
    if direction == "gradient":
        vector = scale(1 / norm(gradient), gradient)
    elif direction == "top":
        vector = power_iteration(exact_hessian_vector_product(losses, parameters, True), vector, 10).vector
    difference = numeric(vector)
    # Built after the weights have moved and come back: a graph does not survive that.
    reference = exact_hessian_vector_product(losses, parameters, keep_graph=False)(vector)
    error = norm([x - y for x, y in zip(difference, reference, strict=True)]) / norm(reference)
    assert error < (0.02 if direction == "random" else 0.005)


@pytest.mark.parametrize("distance", [0.2, -0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_central_difference_is_the_product_but_for_the_distance_s_square(distance, dtype):
    # L = sum(w^4) / 4: grad L = w^3, and (g(w + h v) - g(w - h v)) / (2 h) = 3 w^2 v + h^2 v^3.
    weights, vector = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double), torch.tensor([0.5, 0.5, 0.0]).double()
    there, here = ((weights + side * distance / 2 * vector) ** 3 for side in (1, -1))
    [product] = central_difference([there.to(dtype)], [here.to(dtype)], distance)
    assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = 3 * weights**2 * vector + (distance / 2) ** 2 * vector**3
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.2)

"""Power iteration against Lanczos and matrices whose eigenvectors are known."""

import math

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from hf_xsam.functional.hessian_vector_products import (
    exact_hessian_vector_product,
)
from hf_xsam.functional.power_iteration import power_iteration, random_unit_vector
from hf_xsam.functional.tensors import dot, norm
from tests.cases import tanh_network


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def matrix_product(matrix):
    return lambda vector: [matrix @ vector[0]]


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.double))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.double)) @ basis.T, basis[:, 0]


def test_power_iteration_matches_lanczos():
    network, loss = tanh_network()
    parameters = list(network.parameters())
    product = exact_hessian_vector_product(lambda: [loss()], parameters, keep_graph=True)
    sizes = [p.numel() for p in parameters]

    def matvec(vector):
        parts = torch.as_tensor(vector).flatten().split(sizes)
        return flat(product([part.view_as(p) for part, p in zip(parts, parameters, strict=True)])).numpy()

    operator = LinearOperator((sum(sizes),) * 2, matvec=matvec, dtype=float)
    value, vector = eigsh(operator, k=1, which="LA")
    estimate = power_iteration(product, random_unit_vector(parameters, 0), 300)
    assert abs(flat(estimate.vector) @ torch.as_tensor(vector[:, 0])) > 0.999
    assert estimate.value.item() == pytest.approx(value[0], rel=0.01)
    assert norm(estimate.vector).item() == pytest.approx(1)


@pytest.mark.parametrize("others", [[-3.0, 0.5, 0.1, -0.2], [-1.2, -0.9, 0.3], [-10.0, -9.0, 0.9]])
@pytest.mark.parametrize("iterations", [400, 5, 1])
def test_top_eigenvalue_though_the_largest_is_negative(others, iterations):
    matrix, top = symmetric([1.0, *others, *[0.0] * 20])
    vector, spectrum = [torch.nn.functional.normalize(torch.randn(len(matrix), dtype=torch.double), dim=0)], None
    for _ in range(400 // iterations):
        vector, value, spectrum, _ = power_iteration(matrix_product(matrix), vector, iterations, spectrum)
    assert abs(vector[0] @ top) > 0.999
    assert value.item() == pytest.approx(1.0, rel=0.01)


def test_plain_iteration_where_the_top_dominates():
    matrix, top = symmetric([3.0, -1.0, 0.5, 0.1])
    vector = torch.nn.functional.normalize(top + torch.randn(4, dtype=torch.double), dim=0)
    start = [vector]
    for _ in range(5):
        vector = torch.nn.functional.normalize(matrix @ vector, dim=0)
    estimate = power_iteration(matrix_product(matrix), start, 5)
    torch.testing.assert_close(estimate.vector[0], vector, rtol=0, atol=1e-12)
    assert estimate.spectrum.shift == 0


def refreshes(matrices, vector, momentum=0.0, spectrum=None):
    """Return the estimates of one product of each matrix in turn, from `vector` on."""
    found = []
    for matrix in matrices:
        estimate = power_iteration(matrix_product(matrix), vector, 1, spectrum, momentum)
        vector, spectrum = estimate.vector, estimate.spectrum
        found.append(estimate)
    return found


class TestSpectrum:
    """What is known of the spectrum comes from many products."""

    def test_one_batch_with_a_large_negative_quotient_shifts_nothing(self):
        usual, top = symmetric([2.0, -1.0, 0.5, 0.1])
        odd = usual - 400 * torch.outer(top, top)
        before, after = [usual] * 8, [usual] * 8
        found = refreshes([*before, odd, *after], [top])
        assert {estimate.spectrum.shift.item() for estimate in found} == {0.0}
        assert abs(found[-1].vector[0] @ top) > 0.999

    def test_the_shift_goes_once_the_top_dominates(self):
        at_first, top = symmetric([1.0, -3.0, 0.5, 0.1])
        later = at_first + 9 * torch.outer(top, top)
        start = random_unit_vector([torch.zeros(4, dtype=torch.double)], 0)
        found = refreshes([at_first] * 60 + [later] * 10, start)
        assert found[59].spectrum.shift < -1  # so that 1 - s is above abs(-3 - s)
        assert abs(found[59].vector[0] @ top) > 0.999
        assert found[-1].spectrum.shift == 0
        assert abs(found[-1].vector[0] @ top) > 0.999

    def test_means_are_over_the_last_products(self):
        quotients = [float(number) for number in range(1, 31)]
        found = refreshes([torch.eye(2) * quotient for quotient in quotients], [torch.tensor([1.0, 0.0])])
        for count in range(1, 9):
            assert found[count - 1].spectrum.eigenvalue.item() == pytest.approx(sum(quotients[:count]) / count)
        mean = sum(quotients[:8]) / 8
        for quotient in quotients[8:]:
            mean += (quotient - mean) / 8
        assert found[-1].spectrum.eigenvalue.item() == pytest.approx(mean)
        assert found[-1].spectrum.size.item() == pytest.approx(mean)
        assert found[-1].spectrum.cosine.item() == pytest.approx(1)

    def test_a_batch_with_little_curvature_counts_less_under_momentum(self):
        sharp, top = symmetric([10.0, 1.0, 0.5])
        flat_elsewhere, _ = symmetric([0.1, 0.0, 0.0], seed=1)
        known = refreshes([sharp] * 8, [top])[-1].spectrum
        [after] = refreshes([flat_elsewhere], [top], momentum=0.5, spectrum=known)
        [alone] = refreshes([flat_elsewhere], [top], momentum=0.5)
        assert abs(after.vector[0] @ top) > 0.9999
        assert abs(alone.vector[0] @ top) < 0.99

    def test_growing_curvature_prevails_at_once_under_momentum(self):
        usual, top = symmetric([1.0, 0.5, 0.1])
        sharp, other = symmetric([100.0, 0.0, 0.0], seed=1)
        known = refreshes([usual] * 8, [top])[-1].spectrum
        [after] = refreshes([sharp], [top], momentum=0.8, spectrum=known)
        by_its_own_norm = 0.8 * top + 0.2 * torch.nn.functional.normalize(sharp @ top, dim=0)
        by_its_own_norm = torch.nn.functional.normalize(by_its_own_norm, dim=0)
        assert abs(after.vector[0] @ other) > abs(by_its_own_norm @ other) + 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_the_residual_is_of_the_vector_before_the_last_iteration(iterations, momentum):
    matrix, _ = symmetric([3.0, -1.0, 2.9, 0.1])
    start = random_unit_vector([torch.zeros(4, dtype=torch.double)], 0)
    before = start
    if iterations > 1:
        before = power_iteration(matrix_product(matrix), start, iterations - 1, momentum=momentum).vector
    found = power_iteration(matrix_product(matrix), start, iterations, momentum=momentum)
    expected = (matrix @ before[0] - found.value * before[0]).norm() / found.value.abs()
    assert found.residual.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_residual_of_an_eigenvector_is_zero():
    matrix, top = symmetric([-3.0, -1.0, 0.5, 0.1])
    assert power_iteration(matrix_product(matrix), [top], 1).residual.item() == pytest.approx(0, abs=1e-7)


def test_a_product_of_zero_leaves_the_vector():
    start = random_unit_vector([torch.zeros(3), torch.zeros(2, 2)], 0)
    estimate = power_iteration(lambda vector: [torch.zeros_like(x) for x in vector], start, 3)
    assert all(torch.equal(x, y) for x, y in zip(estimate.vector, start, strict=True))
    assert estimate.value == 0
    assert estimate.is_finite()
    assert estimate.residual.isnan()


@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("seed", range(8))
def test_an_eigenvector_of_the_shift_itself_stays(seed, dtype, momentum):
    start = random_unit_vector([torch.zeros(5, dtype=dtype)], seed)
    estimate = power_iteration(lambda vector: [-2.3 * x for x in vector], start, 9, momentum=momentum)
    torch.testing.assert_close(estimate.vector, start)
    assert estimate.value.item() == pytest.approx(-2.3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_one_product_that_is_not_finite_shows(bad, iteration):
    calls = iter(range(3))

    def product(vector):
        poisoned = [x.clone() for x in vector]
        if next(calls) == iteration:
            poisoned[0][0] = bad
        return poisoned

    assert not power_iteration(product, random_unit_vector([torch.zeros(3), torch.zeros(2, 2)], 0), 3).is_finite()


def test_random_unit_vector_leaves_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = random_unit_vector([torch.zeros(30), torch.zeros(2, 2, dtype=torch.bfloat16)], 7)
    assert torch.equal(torch.rand(3), expected)
    again = random_unit_vector([torch.zeros(30), torch.zeros(2, 2, dtype=torch.bfloat16)], 7)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert {x.dtype for x in first} == {torch.float32}
    assert dot(first, first).item() == pytest.approx(1, abs=1e-6)

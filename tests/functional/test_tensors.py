"""Dot products, perturbation and correction against one long vector, by the formulas as they are written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_xsam.functional.correction import correction_factors
from hf_xsam.functional.perturbation import ascent_perturbation, perturbed
from hf_xsam.functional.tensors import add_scaled, dot, norm, scale, set_to_combination

SHAPES = st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (4, 1, 2)]), min_size=1, max_size=4)


@st.composite
def vectors(draw, count):
    """Draw `count` lists of float64 tensors of the same shapes."""
    shapes, seed = draw(SHAPES), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    size = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    return [[size * torch.randn(s, generator=generator, dtype=torch.double) for s in shapes] for _ in range(count)]


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def close(ours, reference):
    torch.testing.assert_close(ours.double(), reference, rtol=1e-12, atol=1e-12 * float(reference.abs().max()))


class TestTensors:
    @given(vectors(2))
    def test_as_one_long_vector(self, pair):
        x, y = pair
        torch.testing.assert_close(dot(x, y), flat(x) @ flat(y), rtol=1e-9, atol=1e-9 * float(norm(x) * norm(y)))
        close(norm(x), flat(x).norm())
        factor = torch.tensor(-1.7, dtype=torch.double)
        close(flat(scale(factor, x)), -1.7 * flat(x))
        close(flat(add_scaled(x, factor, y)), flat(x) - 1.7 * flat(y))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_summed_in_float32(self, dtype):
        x = [torch.full((1000,), 300.0, dtype=dtype), torch.full((1000,), 1e-3, dtype=dtype)]
        assert norm(x).dtype == torch.float32
        assert norm(x).item() == pytest.approx(300 * 1000**0.5, rel=1e-5)
        assert dot(x, x).item() == pytest.approx(300**2 * 1000, rel=1e-5)
        assert scale(torch.tensor(1000.0), x)[0].max() == 300_000

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match="shorter|longer"):
            dot([torch.ones(1)], [torch.ones(1)] * 2)


class TestPerturbation:
    @given(vectors(2), st.floats(1e-3, 10))
    def test_sam(self, pair, rho):
        w, g = pair
        eps = ascent_perturbation(w, g, rho)
        close(flat(eps), rho * flat(g) / flat(g).norm())
        assert norm(eps).item() == pytest.approx(rho)

    @given(vectors(2), st.floats(1e-3, 10))
    def test_asam(self, pair, rho):
        w, g = pair
        t = flat(w).abs()
        reference = rho * t**2 * flat(g) / (t * flat(g)).norm()
        close(flat(ascent_perturbation(w, g, rho, adaptive=True)), reference)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_a_zero_gradient_has_no_direction(self, adaptive):
        eps = ascent_perturbation([torch.ones(3)], [torch.zeros(3)], 0.5, adaptive)
        assert torch.equal(eps[0], torch.zeros(3))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_weights_come_back_bit_for_bit(self, dtype, error):
        weights = [torch.randn(1000).to(dtype).requires_grad_(), torch.tensor([-0.0, 0.0, 1e-7]).to(dtype)]
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights[0].element_size()]
        before = [weight.detach().clone().view(integer) for weight in weights]
        try:
            with perturbed(weights, [0.37 * torch.randn(weight.shape) for weight in weights]):
                assert all(
                    (w.detach().view(integer) != b).float().mean() > 0.5 for w, b in zip(weights, before, strict=True)
                )
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            assert error
        assert all(torch.equal(w.detach().view(integer), b) for w, b in zip(weights, before, strict=True))


def corrected_gradient(a, v, *settings):
    """Return d as the trainer makes it from a, which is left as it is."""
    d = [x.clone() for x in a]
    size, change = correction_factors(norm(a), dot(a, v), *settings)
    set_to_combination(d, size, v, change)
    return d


class TestCorrection:
    @given(vectors(2), st.floats(0, 2), st.booleans(), st.sampled_from(["paper", "projection", "aligned"]))
    def test_formula(self, pair, alpha, normalize, correction):
        a, v = pair
        v = scale(1 / norm(v), v)
        u = flat(a) / flat(a).norm() if normalize else flat(a)
        along = u @ flat(v)
        factor = {"paper": -along.abs(), "projection": -along, "aligned": along}[correction]
        d = flat(corrected_gradient(a, v, alpha, correction, normalize))
        torch.testing.assert_close(d, u + alpha * factor * flat(v), rtol=1e-9, atol=1e-9 * float(u.norm()))

    def test_only_the_papers_depends_on_the_sign_of_v(self):
        a, v = [torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])]
        minus_v = [-v[0]]
        for correction in ("projection", "aligned"):
            assert torch.equal(
                corrected_gradient(a, v, 0.5, correction)[0], corrected_gradient(a, minus_v, 0.5, correction)[0]
            )
        assert corrected_gradient(a, v, 0.5, "paper", False)[0].tolist() == [1.5, 4.0]
        assert corrected_gradient(a, minus_v, 0.5, "paper", False)[0].tolist() == [4.5, 4.0]

    def test_a_zero_gradient_stays_zero(self):
        d = corrected_gradient([torch.zeros(2)], [torch.tensor([1.0, 0.0])], 0.5)
        assert torch.equal(d[0], torch.zeros(2))

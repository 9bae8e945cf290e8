"""What is measured of a classifier: calibration, the curves of a training, damage to the weights."""

import math
from functools import partial

import damage
import numpy as np
import pytest
import tasks
import torch
import watching
from preparing import SmallCNN
from torch import nn
from training import Job


def test_calibration_by_hand():
    # Confidences 0.9, 0.9 (one of the two is right) and 0.6 (right): (2 * |0.5 - 0.9| + |1 - 0.6|) / 3.
    confidence = torch.tensor([0.9, 0.9, 0.6])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)
    found = watching.calibration_error(logits, torch.tensor([0, 1, 0]))
    assert found == pytest.approx((2 * 0.4 + 0.4) / 3, abs=1e-6)


def test_calibration_against_a_loop():
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(4, (500,), generator=draw)
    confidence, predicted = logits.softmax(1).max(1)
    expected = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            expected += inside.double().mean().item() * abs(right - confidence[inside].mean()).item()
    assert watching.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(watching.calibration_error(logits * math.inf, labels))


class TestDamage:
    @pytest.mark.parametrize("shape", [(7, 64), (5, 160), (6, 32, 3, 3)])
    @pytest.mark.parametrize("bits", [3, 4])
    def test_rounding_leaves_few_values_a_group(self, shape, bits):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = damage.rounded(weight, bits)
        assert found.shape == weight.shape
        for row, original in zip(found.flatten(1), weight.flatten(1), strict=True):
            for group, before in zip(row.split(64), original.split(64), strict=True):
                step = (before.max() - before.min()) / (2**bits - 1)
                assert 2 ** (bits - 1) < len(group.unique()) <= 2**bits
                assert (group - before).abs().max() <= step / 2 + 1e-6

    def test_a_group_of_one_value_stays(self):
        weight = torch.full((2, 64), 0.3)
        assert torch.equal(damage.rounded(weight, 4), weight)

    def test_noise_has_the_weight_s_scale(self):
        weight = 5 * torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
        change = damage.with_noise(weight, 0.1, torch.Generator().manual_seed(1)) - weight
        assert change.std() / weight.std() == pytest.approx(0.1, rel=0.02)

    def test_weights_are_rounded_within_the_block_and_restored_bit_for_bit(self):
        model = SmallCNN()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        matrices = damage.matrices(model)
        assert [tuple(weight.shape) for weight in matrices.values()] == [
            (16, 1, 3, 3),
            (32, 16, 3, 3),
            (64, 32, 3, 3),
            (10, 256),
        ]
        with damage.damaged(model, partial(damage.rounded, bits=3)):
            for name, weight in matrices.items():
                assert not torch.equal(weight, before[name])
                assert all(len(group.unique()) <= 8 for group in weight.flatten(1)[0].split(64))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_weights_are_restored_after_an_error(self):
        model = SmallCNN()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(TypeError), damage.damaged(model, partial(damage.rounded, bits=3)):
            model()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_scores_are_of_the_damaged_model(self):
        torch.manual_seed(0)
        model = SmallCNN()
        batch = {"pixel_values": torch.rand(64, 1, 8, 8), "labels": torch.arange(64) % 10}
        found = damage.scores_after_damage(model, [batch], seed=0)
        assert list(found) == ["int4", "int3", "noise_0.1", "noise_0.2"]
        with damage.damaged(model, partial(damage.rounded, bits=4)):
            model.eval()
            logits = model(**batch)["logits"]
        loss = nn.functional.cross_entropy(logits.double(), batch["labels"]).item()
        assert found["int4"]["loss"] == pytest.approx(loss, abs=1e-12)
        assert len({scores["loss"] for scores in found.values()}) == 4
        assert found == damage.scores_after_damage(model, [batch], seed=0)


@pytest.fixture(scope="module")
def record():
    return Job("digits_cnn_wrong40", "fixed", "one_pass_random", 0, 0.05, 1.0, 2).run()


class TestWatchedRun:
    def test_curves_have_each_epoch(self, record):
        curves = record["metrics"]["epochs"]
        assert list(curves) == ["validation", "wrong_validation", "test"]
        for scores in curves.values():
            assert {name: len(values) for name, values in scores.items()} == {"loss": 2, "accuracy": 2, "ece": 2}
        assert curves["wrong_validation"]["accuracy"][-1] < curves["validation"]["accuracy"][-1]
        for split in ("validation", "test"):
            for name in ("loss", "accuracy"):
                final = record["metrics"][split][name]
                assert curves[split][name][-1] == pytest.approx(final, abs=2e-5)

    def test_the_final_model_is_scored(self, record):
        metrics = record["metrics"]
        assert metrics["test"]["ece"] == pytest.approx(metrics["epochs"]["test"]["ece"][-1], abs=1e-5)
        assert set(metrics["damage"]) == {"int4", "int3", "noise_0.1", "noise_0.2"}
        assert record["settings"]["xsam"]["perturbation"] == "random"

    def test_watching_is_not_counted(self, record):
        assert record["cost"]["forward_passes"] == record["cost"]["steps"] == 2 * math.ceil(1077 / 64)

    def test_watching_changes_no_result(self, record):
        tuning = Job("digits_cnn_wrong40", "tuning", "one_pass_random", 0, 0.05, 1.0, 2).run()
        assert set(tuning["metrics"]) == {"validation"}
        np.testing.assert_equal(tuning["metrics"]["validation"], record["metrics"]["validation"])


@pytest.mark.slow
def test_movies_memorized():
    prepared = tasks.TASKS["movies_memorized"].prepare(3)
    sizes = {name: len(split) for name, split in prepared.splits.items()}
    assert sizes == {"train": 400, "validation": 500, "test": 500, "elsewhere": 500}
    again = tasks.TASKS["movies_memorized"].prepare(3)
    assert prepared.splits["elsewhere"][:5] == again.splits["elsewhere"][:5]
    clean = prepared.splits["validation"]["labels"]
    wrong = sum(a != b for a, b in zip(clean, prepared.wrong_labels, strict=True))
    assert wrong == 0.3 * 500
    assert 0.2 < np.mean(prepared.splits["elsewhere"]["labels"]) < 0.8
    tokens = [set(map(tuple, split["input_ids"])) for split in (prepared.splits["test"], prepared.splits["elsewhere"])]
    assert not tokens[0] & tokens[1]

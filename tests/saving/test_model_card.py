"""X-SAM's part of the model card: its figures, its plot, and its code in the cases that no push covers."""

import math
import sys

import pytest
from huggingface_hub import EvalResult
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hf_xsam import XSAMConfig
from hf_xsam.saving.model_card import (
    draw_plot,
    evaluations,
    further_results,
    is_hub_name,
    loading_snippet,
    sharpness_rows,
    xsam_section,
)
from tests.cases import SIZES

HISTORY = [
    {"step": 10, "loss": 0.7, "xsam/sharpness": 0.1, "xsam/perturbed_loss": 0.8},
    {"step": 20, "loss": 0.5, "xsam/sharpness": 0.3, "xsam/perturbed_loss": 0.8, "xsam/rayleigh_quotient": 12.0},
    {"step": 20, "eval_mm_loss": 0.6, "eval_mm_accuracy": 0.5, "eval_mm_runtime": 1.0, "eval_mm_steps_per_second": 2.0},
    {"step": 30, "loss": 0.4, "xsam/sharpness": 0.2, "xsam/perturbed_loss": 0.6, "xsam/rayleigh_quotient": 3.0},
    {"step": 30, "eval_mm_loss": 0.5, "eval_mm_accuracy": 0.9, "eval_mm_runtime": 1.0},
    {"step": 30, "test_loss": 0.55, "test_runtime": 1.0, "test_model_preparation_time": 0.1, "test_num_tokens": 9},
    {"step": 30, "train_runtime": 9.0, "train_loss": 0.53},
]


def test_the_last_metrics_of_each_split():
    assert evaluations(HISTORY) == {"eval_mm": {"loss": 0.5, "accuracy": 0.9}, "test": {"loss": 0.55}}


def test_results_that_the_stock_card_has_are_not_repeated():
    task = {"task_type": "text-classification", "dataset_type": "glue", "dataset_name": "GLUE"}
    stock = EvalResult(
        **task, dataset_split="validation", metric_type="accuracy", metric_name="Accuracy", metric_value=1
    )
    metrics = {"eval": {"loss": 0.5, "accuracy": 1, "by_class": [1, 1]}, "eval_mm": {"accuracy": 0.9, "loss": math.nan}}
    results = further_results([stock], metrics)
    assert [(r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("validation", "loss", 0.5),
        ("mm", "accuracy", 0.9),
    ]
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in results} == {tuple(task.values())}


def test_sharpness_over_the_run():
    assert sharpness_rows(HISTORY) == [
        ("Rayleigh quotient of the eigenvector", "12", "3", "3", "12"),
        ("sharpness, perturbed loss - loss", "0.1", "0.2", "0.1", "0.3"),
    ]


def test_in_one_pass_the_loss_is_the_perturbed_one(tmp_path, monkeypatch):
    section = xsam_section(XSAMConfig.one_pass(), {}, HISTORY, "plot.png", "code", "user/model")
    assert "| sharpness, rho^2 / 2 * Rayleigh quotient | 0.1 | 0.2 |" in section
    assert "![The Rayleigh quotient, the perturbed loss by optimizer step](plot.png)" in section
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw_plot(HISTORY, tmp_path / "plot.png", one_pass=True)
    _, loss = drawn[0].axes
    assert loss.get_title() == "perturbed loss"
    assert [line.get_ydata().tolist() for line in loss.lines] == [[line["loss"] for line in HISTORY if "loss" in line]]


def test_a_step_that_overflowed_is_out_of_the_range():
    history = [{"xsam/sharpness": value} for value in (math.nan, 0.2, math.inf, 0.1)]
    assert sharpness_rows(history) == [("sharpness, perturbed loss - loss", "nan", "0.1", "0.1", "0.2")]


def test_before_training_and_without_a_correction():
    section = xsam_section(XSAMConfig(alpha=0.0), {}, [], None, "code", "user/model")
    assert "trained with SAM (X-SAM with alpha 0" in section
    for absent in ("### Metrics", "### Sharpness during", "!["):
        assert absent not in section
    for config, method in (
        (XSAMConfig(), "X-SAM"),
        (XSAMConfig.one_pass(), "one pass a step, at weights perturbed along the Hessian's top eigenvector"),
        (XSAMConfig.one_pass(perturbation="random"), "one pass a step, at weights perturbed along a random direction"),
    ):
        section = xsam_section(config, {}, [], None, "code", "user/model")
        assert f"trained with {method}, using" in section


def test_the_plot_shows_the_logs(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn, save = [], figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    assert draw_plot([*HISTORY, {**HISTORY[0], "step": 40, "loss": math.nan}], tmp_path / "plot.png") == "plot.png"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size < 60_000
    eigenvalue, loss = drawn[0].axes
    assert eigenvalue.lines[0].get_xydata().tolist() == [[20, 12], [30, 3]]
    assert [line.get_label() for line in loss.lines] == ["loss", "perturbed loss"]
    assert loss.lines[0].get_xydata()[:3].tolist() == [[10, 0.7], [20, 0.5], [30, 0.4]]

    assert draw_plot(HISTORY[:1], tmp_path / "none.png") is None
    without_eigenvalue = [line for line in HISTORY if "xsam/rayleigh_quotient" not in line] * 2
    assert draw_plot(without_eigenvalue, tmp_path / "sam.png") == "sam.png"
    assert len(drawn[1].axes) == 1


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert draw_plot(HISTORY, tmp_path / "plot.png") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/model", True),
        ("bert-base-uncased", True),
        ("/data/bert", False),
        ("a/b/c", False),
        ("", False),
        (None, False),
    ],
)
def test_names_that_the_hub_takes(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) is expected
    if expected:
        (tmp_path / name).mkdir(parents=True)
        assert not is_hub_name(name)


def test_loading_code_of_an_adapter_names_base_and_labels():
    base = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    code = loading_snippet(adapted, object(), "user/vit", "google/vit")
    assert code.startswith("from peft import PeftModel\nfrom transformers import AutoProcessor, ViTForImageCl")
    assert 'base_model = ViTForImageClassification.from_pretrained("google/vit", num_labels=10)' in code
    assert 'model = PeftModel.from_pretrained(base_model, "user/vit")' in code
    assert 'processor = AutoProcessor.from_pretrained("user/vit")' in code
    assert "base_model = ViTForImageClassification(...)" in loading_snippet(adapted, None, "user/vit", None)


class OwnModel(BertForSequenceClassification):
    pass


def test_loading_code_of_a_model_of_ones_own():
    model = OwnModel(BertConfig(vocab_size=9, **SIZES))
    assert loading_snippet(model, None, "user/own", None).startswith(f"from {__name__} import OwnModel\n")

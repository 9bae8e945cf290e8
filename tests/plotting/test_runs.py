"""`hf-xsam plot`, on the states that trainers have saved; the page in a real browser is in test_page.py."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from hf_xsam import XSAMConfig
from hf_xsam.cli.main import main
from hf_xsam.cli.plot import PlotArguments
from hf_xsam.cli.plot import run as run_plot
from hf_xsam.plotting.figure import COLOURS, DASHES, MARKERS, line_style
from hf_xsam.plotting.page import ROWS, thinned
from hf_xsam.plotting.panels import (
    ESTIMATE,
    Curve,
    build_panels,
    duration,
    measured_table,
    number,
    row_sizes,
    settings_table,
    spans_decade,
)
from hf_xsam.plotting.runs import RunError, find_file, read_runs
from tests.cases import tiny_vit
from tests.helpers import run
from tests.runs_on_disk import trained_runs

SHARPNESS = {
    "model": "tiny",
    "loss": 1.234,
    "gradient_norm": 0.5,
    "eigenvalues": [12.5, -0.0025],
    "gradient_angles_degrees": [56.0, 89.0],
    "trace": {"mean": 20.0, "standard_error": 3.0, "samples": 8},
    "sam_sharpness": {"0.05": 0.01},
    "slices": {},
    "settings": {"targets": 512},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trained_runs(folder)
    return folder


@pytest.fixture
def stock(folder, tmp_path, monkeypatch):
    """A copy of the stock Trainer's run, to damage, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(folder / "stock", tmp_path / "stock")


def refused(capsys, *arguments):
    """Run the command, which must end with status 2, and return the one line that it prints to stderr."""
    with pytest.raises(SystemExit) as exit:
        main(["plot", *map(str, arguments)])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_panels_hold_what_was_logged(folder):
    runs = read_runs([str(folder / name) for name in ("stock", "sam", "xsam")])
    assert [each.name for each in runs] == ["stock", "sam", "xsam"]
    drawn = {panel.title: panel.curves for panel in build_panels(runs)}
    assert {title: [curve.run for curve in curves] for title, curves in drawn.items()} == {
        "Training loss": [0, 1, 2],
        "Evaluation loss": [0, 1, 2],
        "Evaluation accuracy": [0, 1, 2],
        "Measured top eigenvalue of the Hessian": [0, 2],
        "Measured angle, gradient to eigenvector (°)": [0, 2],
        "Measured SAM sharpness": [0, 2],
        "X-SAM's estimate of the top eigenvalue": [2],
        "Angle, gradient to X-SAM's eigenvector (°)": [2],
        "Sharpness: perturbed loss \N{MINUS SIGN} loss": [1, 2],
        "Loss along the top eigenvector": [1, 2],
        "Loss along the gradient": [1, 2],
    }
    history = json.loads((folder / "xsam" / "trainer_state.json").read_text())["log_history"]
    for title, name in (("Training loss", "loss"), ("Evaluation accuracy", "eval_accuracy")):
        assert drawn[title][2].points == {line["step"]: line[name] for line in history if name in line}
        assert len(drawn[title][2].points) == 6
    assert [curve.points.keys() for curve in drawn["Measured top eigenvalue of the Hessian"]] == [{2, 4, 6}, {3, 6}]
    assert len(drawn["X-SAM's estimate of the top eigenvalue"][0].points) == 6
    slices = json.loads((folder / "sam" / "sharpness.json").read_text())["slices"]["gradient"]
    assert drawn["Loss along the gradient"][0].points == dict(zip(slices["distances"], slices["losses"], strict=True))


def test_what_no_run_has_is_left_out(folder):
    drawn = build_panels(read_runs([str(folder / "stock")]))
    assert {panel.title.split()[0] for panel in drawn} == {"Training", "Evaluation", "Measured"}


def test_what_a_callback_of_other_settings_logs(stock):
    line = {"step": 1, "sharpness/trace": 3.0, "sharpness/sam_sharpness_0.01": 1.0, "sharpness/sam_sharpness_0.2": 2.0}
    (stock / "trainer_state.json").write_text(json.dumps({"log_history": [line]}))
    drawn = build_panels(read_runs([str(stock)]))
    assert {panel.title: panel.curves[0].points for panel in drawn} == {
        "Measured SAM sharpness, rho 0.01": {1: 1.0},
        "Measured SAM sharpness, rho 0.2": {1: 2.0},
        "Measured trace of the Hessian": {1: 3.0},
    }


def test_the_estimate_is_called_one(folder):
    noted = {panel.title: panel.note for panel in build_panels(read_runs([str(folder / "xsam")])) if panel.note}
    assert noted == {"X-SAM's estimate of the top eigenvalue": ESTIMATE}


def test_settings_and_results(folder):
    rows = settings_table(read_runs([str(folder / name) for name in ("stock", "sam", "xsam")])).rows
    results = [json.loads((folder / name / "all_results.json").read_text()) for name in ("stock", "sam", "xsam")]
    seconds = [duration(each["train_runtime"]) for each in results]
    tested = {name: [number(each[name]) for each in results] for name in ("test_accuracy", "test_loss")}
    assert rows == {
        "Method": ["stock Trainer", "SAM", "X-SAM"],
        "Correction": ["", "", "paper"],
        "rho": ["", "0.01", "0.01"],
        "alpha": ["", "", "0.2"],
        "Learning rate, highest logged": ["0.01"] * 3,
        "Epochs": ["3"] * 3,
        "Optimizer steps": ["6"] * 3,
        "Training time": seconds,
        "Test accuracy": tested["test_accuracy"],
        "Test loss": tested["test_loss"],
    }


def test_settings_without_the_files_beside_the_state(folder, tmp_path):
    """What was logged says which method it was, how long it took, and what a test gave."""
    for name in ("stock", "sam", "xsam"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / name / "trainer_state.json", tmp_path / name)
    rows = settings_table(read_runs([str(tmp_path / name) for name in ("stock", "sam", "xsam")])).rows
    assert rows["Method"] == ["stock Trainer", "SAM", "X-SAM"]
    assert rows.keys().isdisjoint({"Correction", "rho", "alpha"})
    assert all(rows["Training time"])
    assert all(rows["Test accuracy"])


def test_settings_of_a_published_model(tmp_path):
    """It has no history, so that how long it was trained is not known."""
    XSAMConfig(rho=0.3, adaptive=True, correction="aligned").save_pretrained(tmp_path)
    (tmp_path / "sharpness.json").write_text(json.dumps(SHARPNESS))
    rows = settings_table(read_runs([str(tmp_path)])).rows
    assert rows == {"Method": ["X-SAM"], "Correction": ["aligned"], "rho": ["0.3, adaptive"], "alpha": ["0.2"]}
    XSAMConfig.one_pass(rho=0.2, start_step=0.7).save_pretrained(tmp_path)
    rows = settings_table(read_runs([str(tmp_path)])).rows
    assert rows == {"Method": ["X-SAM, one pass"], "rho": ["0.2"], "Start step": ["0.7"]}
    (tmp_path / "xsam_config.json").unlink()
    assert settings_table(read_runs([str(tmp_path)])) is None


def test_a_stock_run_in_the_folder_of_an_earlier_one(stock):
    XSAMConfig().save_pretrained(stock)
    rows = settings_table(read_runs([str(stock)])).rows
    assert rows["Method"] == ["stock Trainer"]
    assert "rho" not in rows


def test_results_of_transformers_example_scripts(stock):
    """They write counts and times beside the results, and predict where the recipes test."""
    results = {"epoch": 3.0, "eval_samples": 8, "predict_accuracy": 0.5, "predict_steps_per_second": 9.0, "note": "x"}
    results |= {"total_flos": 1e12, "train_loss": 2.0, "train_runtime": 4020.0, "eval_f1": 0.25}
    (stock / "all_results.json").write_text(json.dumps(results))
    rows = settings_table(read_runs([str(stock)])).rows
    assert rows["Training time"] == ["1 h 7 min"]
    shown = ("Predict accuracy", "Test accuracy", "Test loss", "Evaluation f1")
    assert tuple(rows)[-4:] == shown
    assert [rows[name] for name in ("Predict accuracy", "Evaluation f1")] == [["0.5000"], ["0.2500"]]


@pytest.mark.parametrize("name", ["all_results.json", "xsam_config.json"])
def test_damaged_settings_and_results(folder, tmp_path, capsys, name):
    shutil.copytree(folder / "xsam", tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    assert f"{tmp_path / 'run' / name} is damaged" in refused(capsys, tmp_path / "run")


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.974, "4.97 s"), (59.6, "59.6 s"), (61, "1 min 1 s"), (3599.7, "1 h 0 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_no_panel_is_alone_in_its_row():
    assert [row_sizes(count) for count in range(1, 8)] == [[1], [2], [3], [2, 2], [3, 2], [3, 3], [3, 2, 2]]
    for count in range(8, 30):
        sizes = row_sizes(count)
        assert sum(sizes) == count
        assert set(sizes) <= {2, 3}
        assert sizes == sorted(sizes, reverse=True)


def test_table_of_what_was_measured(folder, stock):
    assert measured_table(read_runs([str(stock)])) is None
    (stock / "sharpness.json").write_text(json.dumps(SHARPNESS))
    rows = measured_table(read_runs([str(stock), str(folder / "xsam")])).rows
    assert {name: cells[0] for name, cells in rows.items()} == {
        "Loss": "1.234",
        "Gradient norm": "0.5000",
        "Eigenvalue 1": "12.50",
        "Eigenvalue 2": "\N{MINUS SIGN}0.002500",
        "Angle, gradient to eigenvector 1 (°)": "56.00",
        "Angle, gradient to eigenvector 2 (°)": "89.00",
        "Trace, ± standard error": "20.00 ± 3.000",
        "SAM sharpness, rho 0.05": "0.01000",
        "SAM sharpness, rho 0.01": "",
    }
    assert all(cells[1] for cells in rows.values())


def test_only_loss_and_eigenvalues_have_to_be_measured(stock):
    (stock / "sharpness.json").write_text(json.dumps({"model": "m", "loss": 1, "eigenvalues": [2.0], "trace": None}))
    assert measured_table(read_runs([str(stock)])).rows == {"Loss": ["1.000"], "Eigenvalue 1": ["2.000"]}


def test_the_newest_checkpoint_stands_in_for_a_run_that_goes_on(tmp_path):
    torch.manual_seed(0)
    model, batch = tiny_vit()
    run(model, batch, tmp_path, XSAMConfig(), save_strategy="steps", save_steps=1, num_train_epochs=5)
    assert not (tmp_path / "trainer_state.json").exists()
    (tmp_path / "checkpoint-best").mkdir()
    shutil.copy(tmp_path / "checkpoint-1" / "trainer_state.json", tmp_path / "checkpoint-best")
    assert find_file(tmp_path) == tmp_path / "checkpoint-10" / "trainer_state.json"
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()  # as if its saving had been interrupted
    assert find_file(tmp_path) == tmp_path / "checkpoint-9" / "trainer_state.json"
    (tmp_path / "sharpness.json").write_text(json.dumps(SHARPNESS))
    [found] = read_runs([str(tmp_path)])
    assert (found.name, found.steps, found.sharpness.figures["Loss"]) == (tmp_path.name, 9, [1.234])


def test_runs_are_named_by_what_tells_them_apart(folder, tmp_path):
    for path in ("a/output", "b/output"):
        shutil.copytree(folder / "stock", tmp_path / path)
    paths = [tmp_path / "a/output", tmp_path / "b/output", folder / "xsam", tmp_path / "a/output/trainer_state.json"]
    runs = read_runs([str(path) for path in paths])
    assert [each.name for each in runs] == ["a/output", "b/output", f"{folder.name}/xsam"]
    assert read_runs([str(folder / "sam" / "trainer_state.json")])[0].sharpness is not None


def test_figure_and_page(folder, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    main(["plot", *(str(folder / name) for name in ("stock", "sam", "xsam")), "--output", str(output)])
    assert capsys.readouterr().out.split() == [str(output / "runs.png"), str(output / "runs.html")]
    pixels = (255 * imread(output / "runs.png")[:, :, :3]).round().astype(int)
    assert pixels.shape[1] == 1980
    for colour in COLOURS[:3]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=2) == 0).sum() > 1000, colour
    page = (output / "runs.html").read_text(encoding="utf-8")
    history = json.loads((folder / "sam" / "trainer_state.json").read_text())["log_history"]
    for line in history:
        if "loss" in line:
            assert f"<td>{number(line['loss'])}</td>" in page


def test_a_model_that_was_measured_only(stock, tmp_path):
    (tmp_path / "model").mkdir()
    slices = {"gradient": {"distances": [0.0, 1.0], "losses": [3.25, 4.5]}}
    (tmp_path / "model" / "sharpness.json").write_text(json.dumps({**SHARPNESS, "slices": slices}))
    for runs in (["model"], ["model", "stock"], ["model/sharpness.json"]):
        main(["plot", *runs])
        page = (tmp_path / "plot" / "runs.html").read_text(encoding="utf-8")
        assert '<span>model <span class="soft">measured</span>' in page
        assert "<td>3.250</td>" in page
        assert ("Training loss" in page) == ("stock" in runs)
    (tmp_path / "model" / "sharpness.json").write_text(json.dumps(SHARPNESS))
    with pytest.raises(RunError, match="Nothing to draw in model: no loss was logged and no slice was measured"):
        run_plot(PlotArguments(["model"]))


def test_a_loss_that_is_not_a_number_is_shown_and_not_drawn(stock, tmp_path):
    state = json.loads((stock / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    for value, line in zip((math.nan, math.inf, -math.inf), lines, strict=False):
        line |= {"loss": value, "xsam/rayleigh_quotient": value}
    (stock / "trainer_state.json").write_text(json.dumps(state))
    main(["plot", str(stock), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "runs.html").read_text(encoding="utf-8")
    assert all(f"<td>{text}</td>" in page for text in ("nan", "inf", "\N{MINUS SIGN}inf"))


def test_names_are_escaped(folder, tmp_path):
    path = tmp_path / "_<img src=x onerror=alert(1)> & $x^"
    shutil.copytree(folder / "xsam", path)
    main(["plot", str(path), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "runs.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "_&lt;img src=x onerror=alert(1)&gt; &amp; $x^ <span" in page


@pytest.mark.parametrize(
    ("values", "log"),
    [([1.0, 9.0], False), ([1.0, 11.0], True), ([0.0, 100.0], False), ([-1.0, 100.0], False), ([math.nan], False)],
)
def test_logarithmic_scale_where_it_helps(values, log):
    assert spans_decade([Curve(0, {float(i): value for i, value in enumerate(values)})]) is log


@pytest.mark.parametrize(
    ("value", "text"),
    [(2, "2.000"), (2348.2, "2348"), (-0.5, "\N{MINUS SIGN}0.5000"), (1e-5, "1.000e\N{MINUS SIGN}05")],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_long_runs_have_short_tables():
    points = {float(i): float(i) for i in range(1234)}
    kept = thinned(Curve(0, points))
    assert len(kept) == ROWS
    assert {0.0, 1233.0} <= kept.keys()
    gaps = np.diff(sorted(kept))
    assert gaps.max() - gaps.min() <= 1
    short = {float(i): 1.0 for i in range(ROWS)}
    assert thinned(Curve(0, short)) == short


def test_many_runs_differ_in_look():
    looks = {(str(style["color"]), str(style["linestyle"]), style["marker"]) for style in map(line_style, range(100))}
    assert len(looks) == 100
    assert math.lcm(len(COLOURS), len(DASHES), len(MARKERS)) >= 100


def test_missing_folder(tmp_path, capsys):
    assert f"There is no run at {tmp_path / 'nowhere'}; give the output_dir" in refused(capsys, tmp_path / "nowhere")


def test_folder_without_a_run(tmp_path, capsys):
    (tmp_path / "checkpoint-3").mkdir()
    assert f"Neither {tmp_path} nor a checkpoint in it holds a trainer_state.json; " in refused(capsys, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged: it is not JSON ("),
        (lambda text: b"\xff" + text, "is damaged: it is not JSON ("),
        (lambda text: b"", "is damaged: it is not JSON ("),
        (lambda text: b"[]", "holds a JSON list, not an object; "),
        (lambda text: b"{}", "it has no log_history of steps; "),
        (lambda text: b'{"log_history": [{"loss": 1}]}', "it has no log_history of steps; "),
    ],
)
def test_damaged_state(stock, capsys, content, message):
    path = stock / "trainer_state.json"
    path.write_bytes(content(path.read_bytes()))
    error = refused(capsys, stock)
    assert str(path) in error
    assert message in error
    assert "plot a checkpoint of the run instead" in error


@pytest.mark.parametrize(
    "change",
    [
        {"eigenvalues": 3},
        {"eigenvalues": ["a"]},
        {"loss": "low"},
        {"slices": {"gradient": {"distances": [0, 1], "losses": [1]}}},
        {"slices": []},
        {"trace": 3.0},
        {"sam_sharpness": [1]},
        {"settings": [1]},
    ],
)
def test_damaged_sharpness(stock, capsys, change):
    path = stock / "sharpness.json"
    path.write_text(json.dumps({**SHARPNESS, **change}))
    error = refused(capsys, stock)
    assert f"{path} was not written by hf-xsam sharpness" in error
    assert "measure the model again" in error
    path.write_text(json.dumps({"model": "m", "loss": 1.0}))
    assert "KeyError('eigenvalues')" in refused(capsys, stock)


def test_nothing_to_draw(stock, capsys):
    (stock / "trainer_state.json").write_text('{"log_history": [{"step": 3, "train_runtime": 1.0}]}')
    assert f"Nothing to draw in {stock}: " in refused(capsys, stock)


def test_output_that_is_a_file(stock, capsys):
    path = stock / "trainer_state.json"
    assert str(path) in refused(capsys, stock, "--output", path)


def test_without_matplotlib(stock, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("hf_xsam.plotting", "hf_xsam.plotting.figure"):
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'hf_xsam[tools]'" in refused(capsys, stock)


def test_without_a_run(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["plot"])
    assert exit.value.code == 2
    assert "the following arguments are required: --runs" in capsys.readouterr().err

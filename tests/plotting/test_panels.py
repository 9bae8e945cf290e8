"""What `hf-xsam plot` draws of runs: panels, tables, figure and page; the page in a real browser is in test_page.py."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
from matplotlib.image import imread

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
    spans_decade,
)
from hf_xsam.plotting.runs import RunError, read_runs
from tests.plotting.measured import SHARPNESS


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


def test_nothing_to_draw(stock, refused):
    (stock / "trainer_state.json").write_text('{"log_history": [{"step": 3, "train_runtime": 1.0}]}')
    assert f"Nothing to draw in {stock}: " in refused(stock)


def test_output_that_is_a_file(stock, refused):
    path = stock / "trainer_state.json"
    assert str(path) in refused(stock, "--output", path)


def test_without_matplotlib(stock, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("hf_xsam.plotting", "hf_xsam.plotting.figure"):
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'hf_xsam[tools]'" in refused(stock)

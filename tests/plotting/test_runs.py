"""What `hf-xsam plot` reads of runs: their states, settings, results and names, and what it says of damaged ones."""

import json
import shutil

import pytest
import torch

from hf_xsam import XSAMConfig
from hf_xsam.cli.main import main
from hf_xsam.plotting.panels import (
    duration,
    number,
    settings_table,
)
from hf_xsam.plotting.runs import find_file, read_runs
from tests.cases import tiny_vit
from tests.helpers import run
from tests.plotting.measured import SHARPNESS


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
def test_damaged_settings_and_results(folder, tmp_path, refused, name):
    shutil.copytree(folder / "xsam", tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    assert f"{tmp_path / 'run' / name} is damaged" in refused(tmp_path / "run")


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


def test_missing_folder(tmp_path, refused):
    assert f"There is no run at {tmp_path / 'nowhere'}; give the output_dir" in refused(tmp_path / "nowhere")


def test_folder_without_a_run(tmp_path, refused):
    (tmp_path / "checkpoint-3").mkdir()
    assert f"Neither {tmp_path} nor a checkpoint in it holds a trainer_state.json; " in refused(tmp_path)


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
def test_damaged_state(stock, refused, content, message):
    path = stock / "trainer_state.json"
    path.write_bytes(content(path.read_bytes()))
    error = refused(stock)
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
def test_damaged_sharpness(stock, refused, change):
    path = stock / "sharpness.json"
    path.write_text(json.dumps({**SHARPNESS, **change}))
    error = refused(stock)
    assert f"{path} was not written by hf-xsam sharpness" in error
    assert "measure the model again" in error
    path.write_text(json.dumps({"model": "m", "loss": 1.0}))
    assert "KeyError('eigenvalues')" in refused(stock)


def test_without_a_run(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["plot"])
    assert exit.value.code == 2
    assert "the following arguments are required: --runs" in capsys.readouterr().err

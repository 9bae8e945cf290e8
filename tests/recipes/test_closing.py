"""The end of a run where the disk is full or the hub refuses: results first, and a line that says where all lies."""

import json
import re
import resource
from pathlib import Path

import pytest
import text_classification
from transformers import BertForSequenceClassification

from tests.fake_hub import READ_TOKEN, WRITE_TOKEN
from tests.recipes import test_text_classification
from tests.recipes.test_text_classification import flags

model_and_data = test_text_classification.model_and_data
SHORT = {"max_steps": "2", "eigenvalue_samples": "0", "push_to_hub": "true", "hub_model_id": "tester/reviews"}


@pytest.fixture
def small_files():
    """Let this process write no file as large as a model, and the system say so instead of ending the process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_that_cannot_be_saved_leaves_the_results(model_and_data, small_files, monkeypatch, capsys):
    """The limit holds from the end of the evaluation on, in place of a disk that is full."""
    measure = text_classification.train_and_report.__globals__["peak_main_memory_gib"]

    def limit_and_measure():
        small_files()
        return measure()

    monkeypatch.setitem(text_classification.train_and_report.__globals__, "peak_main_memory_gib", limit_and_measure)
    with pytest.raises(ValueError, match=r"The model could not be saved into '.*output' \(.*File too large") as ended:
        text_classification.main(flags(model_and_data | {"max_steps": "2", "eigenvalue_samples": "0"}))
    assert re.search("The results are in '.*output/all_results.json'", str(ended.value))
    results = json.loads((Path(model_and_data["output_dir"]) / "all_results.json").read_text())
    assert {"eval_accuracy", "test_accuracy", "train_loss"} <= results.keys()
    assert "test_accuracy" in capsys.readouterr().out
    assert (Path(model_and_data["output_dir"]) / "trainer_state.json").exists()


def test_a_push_that_fails_names_the_repository_and_the_model(model_and_data, hub, capsys):
    hub.failures += [("POST", ".*commit.*", 403)]
    message = r"The push to the repository 'tester/reviews' failed \(.+\)\. The model lies in '(.*output)': push it by "
    with pytest.raises(ValueError, match=message):
        text_classification.main(flags(model_and_data | SHORT | {"hub_token": WRITE_TOKEN}))
    output = Path(model_and_data["output_dir"])
    BertForSequenceClassification.from_pretrained(output)
    assert (output / "all_results.json").exists()
    assert "test_accuracy" in capsys.readouterr().out


def test_a_repository_that_cannot_be_written_is_said_before_training(model_and_data, hub):
    with pytest.raises(
        ValueError, match="push_to_hub is true, and the repository 'tester/reviews' cannot be written: "
    ):
        text_classification.main(flags(model_and_data | SHORT | {"hub_token": READ_TOKEN}))
    assert not (Path(model_and_data["output_dir"]) / "all_results.json").exists()

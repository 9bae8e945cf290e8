"""The recipe in all three modes on a tiny model, from the command line, YAML and `accelerate launch`."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import arguments
import closing
import pytest
import text_classification
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, constants
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from hf_xsam import XSAMCallback
from hf_xsam.data import movie_reviews
from tests.fake_hub import WRITE_TOKEN

RECIPES = Path(__file__).parent.parent.parent / "recipes"
WORDS = ["good", "fine", "great", "bad", "poor", "dull", "film", "plot"]


@pytest.fixture
def model_and_data(tmp_path):
    """Return the options that name a tiny model and a csv file, good words against bad ones."""
    model, data = tmp_path / "model", tmp_path / "train.csv"
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=13, **sizes)).save_pretrained(model)
    with data.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict"])
        for i in range(60):
            writer.writerow([f"{WORDS[i % 6]} {WORDS[6 + i % 2]}", "yes" if i % 6 < 3 else "no"])
    options = {"model_name_or_path": model, "train_file": data, "test_file": data, "text_column": "review"}
    options |= {"label_column": "verdict", "output_dir": tmp_path / "output", "learning_rate": 0.01, "rho": 0.01}
    options |= {"num_train_epochs": 8, "use_cpu": True, "report_to": "none", "logging_steps": 5, "save_strategy": "no"}
    return {name: str(value) for name, value in options.items()}


def flags(options):
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("mode", ["trainer", "sam", "xsam"])
def test_learns_in_each_mode(model_and_data, mode, capsys):
    metrics = text_classification.main([*flags(model_and_data), "--optimizer_mode", mode])
    assert metrics["test_accuracy"] > 0.9
    assert metrics["test_f1"] > 0.9
    assert metrics["top_eigenvalue"] > 0
    table = capsys.readouterr().out
    assert f"{mode} on" in table
    assert ("xsam/sharpness" in table) == (mode != "trainer")
    assert ("xsam/rayleigh_quotient" in table) == (mode == "xsam")
    saved = BertForSequenceClassification.from_pretrained(model_and_data["output_dir"])
    assert saved.config.id2label == {0: "no", 1: "yes"}


def test_a_measurement_that_fails_costs_neither_model_nor_metrics(model_and_data, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(XSAMCallback, "measure", fail)
    metrics = text_classification.main([*flags(model_and_data), "--max_steps", "2"])
    assert "The top eigenvalue was not measured: OutOfMemoryError('no memory is left')" in caplog.text
    assert "top_eigenvalue" not in metrics
    output = Path(model_and_data["output_dir"])
    assert json.loads((output / "all_results.json").read_text())["test_accuracy"] == metrics["test_accuracy"]
    BertForSequenceClassification.from_pretrained(output)


@pytest.mark.parametrize("mode", ["trainer", "xsam"])
def test_pushes_with_task_and_data_on_the_card(model_and_data, hub, mode):
    pushing = {"push_to_hub": True, "hub_model_id": "tester/reviews", "hub_token": WRITE_TOKEN, "max_steps": 2}
    pushing |= {"optimizer_mode": mode, "eigenvalue_samples": 0}
    metrics = text_classification.main(flags(model_and_data | {name: str(value) for name, value in pushing.items()}))
    repository = hub.repositories["tester/reviews"]
    assert [title for title, _ in repository.commits] == ["End of training"]
    assert {"model.safetensors", "all_results.json", "trainer_state.json"} <= repository.files.keys()
    card = ModelCard(repository.files["README.md"].decode())
    assert "on the train.csv dataset" in card.text
    assert ("x-sam" in card.data.tags) == (mode == "xsam")
    if mode == "xsam":
        assert f"| test | {metrics['test_loss']:.4g} | {metrics['test_accuracy']:.4g} |" in card.text


def test_card_facts_of_named_and_of_embedded_model_and_data():
    named = arguments.RecipeArguments(model_name_or_path="m", dataset_name="nyu-mll/glue", dataset_config_name="sst2")
    data = {"dataset": "nyu-mll/glue", "dataset_tags": "nyu-mll/glue", "dataset_args": "sst2"}
    assert closing.card_facts(named, "text-classification", "model", "data") == {"tasks": "text-classification", **data}
    embedded = closing.card_facts(arguments.RecipeArguments(), "text-classification", "model", "data")
    assert embedded == {"tasks": "text-classification", "finetuned_from": "model", "dataset": "data"}


def test_yaml_with_options_after_it(model_and_data, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(model_and_data | {"max_steps": 9}))
    text_classification.main([str(settings), "--max_steps", "3", "--eigenvalue_samples", "0"])
    state = (Path(model_and_data["output_dir"]) / "trainer_state.json").read_text()
    assert '"global_step": 3' in state


@pytest.mark.parametrize(
    ("content", "message"), [("rhoo: 0.1", "sets rhoo, which no option"), ("- 1", "holds a list; it must map")]
)
def test_bad_yaml_is_refused(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        text_classification.main([str(tmp_path / "bad.yaml")])


def test_wrong_columns_and_files_are_named(model_and_data):
    with pytest.raises(ValueError, match=r"label_column is 'mark'; .*train\.csv has review, verdict"):
        text_classification.main(flags(model_and_data | {"label_column": "mark"}))
    with pytest.raises(ValueError, match=r"text_column is 'text'; .*train\.csv has review, verdict"):
        text_classification.main(flags(model_and_data | {"text_column": "text"}))
    with pytest.raises(ValueError, match="max_train_samples is 0; it must be at least 1, or left out"):
        text_classification.main(flags(model_and_data | {"max_train_samples": 0}))
    with pytest.raises(ValueError, match=r"train_file is 'data\.txt'; it must end in \.csv"):
        text_classification.main(flags(model_and_data | {"train_file": "data.txt"}))


@pytest.mark.parametrize("option", ["validation_file", "test_file"])
def test_a_label_of_held_out_data_that_is_no_class(model_and_data, tmp_path, option):
    rows = ["good film,yes", "bad film,no"] * 10
    rows[16] = "good film,Yes"
    (tmp_path / "other.csv").write_text("\n".join(["review,verdict", *rows]))
    message = r"'verdict' holds 'Yes' in row 17 of .*other\.csv, which is no class of .*train\.csv \(no, yes\): correct"
    with pytest.raises(ValueError, match=message):
        text_classification.main(flags(model_and_data | {option: str(tmp_path / "other.csv")}))


def test_a_test_split_of_the_hub_without_numbers_is_left_out(model_and_data, tmp_path, caplog):
    """As in GLUE's STS-B; a folder stands for a data set on the hub."""
    for name, scores in (("train", [0.5, 1.5] * 10), ("test", [-1.0] * 4)):
        rows = {"review": ["good film"] * len(scores), "verdict": scores}
        (tmp_path / "hub").mkdir(exist_ok=True)
        Dataset.from_dict(rows).to_parquet(tmp_path / "hub" / f"{name}.parquet")
    options = {"dataset_name": str(tmp_path / "hub"), "train_file": "", "test_file": "", "max_steps": "1"}
    metrics = text_classification.main(flags(model_and_data | options))
    assert "eval_mse" in metrics
    assert "test_mse" not in metrics
    assert "The test split is left out: it has no labels." in caplog.text


def test_a_classifier_of_other_classes_gets_a_new_head(model_and_data):
    folder = model_and_data["model_name_or_path"]
    BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=3)).save_pretrained(folder)
    text_classification.main(flags(model_and_data | {"max_steps": "1", "eigenvalue_samples": "0"}))
    assert BertForSequenceClassification.from_pretrained(model_and_data["output_dir"]).config.num_labels == 2


@pytest.mark.parametrize("mode", ["trainer", "xsam"])
def test_an_interrupted_run_goes_on(model_and_data, mode):
    options = {"save_strategy": "steps", "save_steps": "2", "eigenvalue_samples": "0", "optimizer_mode": mode}
    text_classification.main(flags(model_and_data | options | {"max_steps": "4"}))
    output = Path(model_and_data["output_dir"])
    whole = (output / "model.safetensors").read_bytes()
    shutil.rmtree(output / "checkpoint-4")
    for resume in ("true", str(output / "checkpoint-2")):
        (output / "model.safetensors").unlink()
        text_classification.main(flags(model_and_data | options | {"max_steps": "4", "resume_from_checkpoint": resume}))
        assert (output / "model.safetensors").read_bytes() == whole
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4
        shutil.rmtree(output / "checkpoint-4")


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch(model_and_data, hub, processes):
    # With --cpu, accelerate would leave the second process to mpirun; without it, --use_cpu keeps the GPUs out.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu" if processes > 1 else "--cpu"]
    launch += ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, *launch, str(RECIPES / "text_classification.py"), *flags(model_and_data)]
    push = ["--push_to_hub", "--hub_model_id", "tester/reviews", "--hub_token", WRITE_TOKEN, "--hub_strategy", "end"]
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    command = [*command, *push, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "4"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    states = list((Path(model_and_data["output_dir"]) / "checkpoint-4").glob("rng_state*"))
    assert len(states) == processes
    assert result.stdout.count("xsam on") == 1
    assert [title for title, _ in hub.repositories["tester/reviews"].commits] == ["End of training"]
    assert {"model.safetensors", "xsam_config.json"} <= hub.repositories["tester/reviews"].files.keys()


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    path = movie_reviews.cached_archive()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path} is damaged.*Delete it"):
        movie_reviews.load_movie_reviews()


def test_no_network_is_said(nothing_downloaded):
    with pytest.raises(ValueError, match=r"could not download vaderSentiment==3\.3\.2.*or use your own data"):
        movie_reviews.load_movie_reviews()


@pytest.mark.slow
def test_the_embedded_default(tmp_path):
    config = str(RECIPES / "configs" / "movie_reviews.yaml")
    sizes = ["--max_train_samples", "160", "--max_eval_samples", "100", "--num_train_epochs", "1"]
    metrics = text_classification.main([config, *sizes, "--output_dir", str(tmp_path), "--eigenvalue_samples", "16"])
    assert 0.3 < metrics["test_accuracy"] <= 1
    splits = movie_reviews.load_movie_reviews()
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [8484, 1060, 1061]

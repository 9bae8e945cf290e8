"""Numbers, several classes a row and one class a row, from files of each kind; folders of images."""

import csv
import json
from pathlib import Path

import image_classification
import numpy as np
import problems
import pytest
import text_classification
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModelForSequenceClassification, EvalPrediction

from hf_xsam.cli.main import main as command_line
from tests.recipes import test_image_classification, test_text_classification
from tests.recipes.test_text_classification import WORDS, flags

model_and_data = test_text_classification.model_and_data
images = test_image_classification.options
SHORT = {"max_steps": "2", "eigenvalue_samples": "0", "optimizer_mode": "trainer"}


def write(path, rows):
    """Write rows, dicts, to a csv, tsv or jsonl file."""
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def with_data(options, path, label):
    """Return the options with a file of a label for each pair of words, which `label` makes of their numbers."""
    rows = [{"review": f"{WORDS[i % 6]} {WORDS[6 + i % 2]}", "verdict": label(i % 6, i % 2)} for i in range(60)]
    file = write(path, rows)
    return options | {"train_file": file, "test_file": file}


@pytest.mark.parametrize("mode", ["trainer", "sam", "xsam"])
def test_floats_are_predicted(model_and_data, tmp_path, mode):
    options = with_data(model_and_data, tmp_path / "scores.csv", lambda word, _: 0.25 + (word < 3))
    metrics = text_classification.main(flags(options | {"optimizer_mode": mode}))
    assert metrics["test_mse"] < 0.05  # the variance is 0.25
    assert metrics["test_pearson"] > 0.95
    assert metrics["test_spearman"] > 0.8
    assert metrics["top_eigenvalue"] > 0
    saved = AutoModelForSequenceClassification.from_pretrained(options["output_dir"])
    assert (saved.config.num_labels, saved.config.problem_type) == (1, "regression")
    words = ["sharpness", options["output_dir"], "--dataset", options["train_file"], "--text_column", "review"]
    words += ["--label_column", "verdict", "--trace_samples", "0", "--slice_points", "0", "--progress", "false"]
    command_line([*words, "--device", "cpu", "--samples", "60"])
    found = json.loads((Path(options["output_dir"]) / "sharpness.json").read_text())
    assert found["loss"] == pytest.approx(metrics["test_mse"], rel=1e-4)


@pytest.mark.parametrize("mode", ["trainer", "sam", "xsam"])
@pytest.mark.parametrize("kind", ["lists.jsonl", "texts.csv"])
def test_several_classes_a_row(model_and_data, tmp_path, mode, kind):
    def label(word, noun):
        classes = ["text", "kind" if word < 3 else "unkind"]
        return classes if kind == "lists.jsonl" else "; ".join(classes)

    options = with_data(model_and_data, tmp_path / kind, label)
    if kind == "texts.csv":
        options |= {"problem_type": "multi_label_classification"}
    options |= {"optimizer_mode": mode, "num_train_epochs": "20", "learning_rate": "0.02"}
    metrics = text_classification.main(flags(options))
    assert metrics["test_f1_micro"] > 0.9
    assert metrics["test_f1_macro"] > 0.9
    saved = AutoModelForSequenceClassification.from_pretrained(options["output_dir"])
    assert saved.config.id2label == {0: "kind", 1: "text", 2: "unkind"}
    assert saved.config.problem_type == "multi_label_classification"


def test_a_class_in_a_test_row_that_is_unknown_among_several(model_and_data, tmp_path):
    options = with_data(model_and_data, tmp_path / "train.jsonl", lambda word, noun: ["a", "b"][: 1 + noun])
    test = write(tmp_path / "test.jsonl", [{"review": "good", "verdict": ["a"]}, {"review": "bad", "verdict": ["c"]}])
    with pytest.raises(ValueError, match=r"'verdict' holds 'c' in row 2 of .*test\.jsonl, which is no class"):
        text_classification.main(flags(options | SHORT | {"test_file": test}))
    mixed = write(tmp_path / "mixed.jsonl", [{"review": "good", "verdict": ["a"]}, {"review": "bad", "verdict": "b"}])
    with pytest.raises(ValueError, match=r"'verdict' holds 'b' in row 2 of .*mixed\.jsonl, not a list of classes"):
        text_classification.main(flags(options | SHORT | {"test_file": mixed}))


@pytest.mark.parametrize(
    ("label", "problem", "names"),
    [
        (lambda word, noun: word, None, {i: str(i) for i in range(6)}),
        (
            lambda word, noun: word / 2,
            "single_label_classification",
            dict(enumerate(["0", "0.5", "1", "1.5", "2", "2.5"])),
        ),
        (lambda word, noun: word, "regression", {0: "LABEL_0"}),
        (lambda word, noun: f"{word}.5", "regression", {0: "LABEL_0"}),
        (lambda word, noun: ["NA", "None"][noun], None, {0: "NA", 1: "None"}),
    ],
    ids=["integers", "floats-as-classes", "integers-as-numbers", "texts-as-numbers", "names-of-nothing"],
)
@pytest.mark.parametrize("kind", [".tsv", ".jsonl"])
def test_an_option_says_what_labels_are(model_and_data, tmp_path, label, problem, names, kind):
    options = with_data(model_and_data, tmp_path / f"train{kind}", label) | SHORT
    if problem:
        options["problem_type"] = problem
    metrics = text_classification.main(flags(options))
    assert ("test_mse" in metrics) == (problem == "regression")
    assert ("test_f1" in metrics) == (problem != "regression")
    assert AutoModelForSequenceClassification.from_pretrained(options["output_dir"]).config.id2label == names


def test_files_of_several_kinds_are_read_each_as_its_own(model_and_data, tmp_path):
    """The csv's labels are integers, the json's texts, and only one of them has a third column."""
    train = write(
        tmp_path / "train.csv", [{"review": f"{word} film", "verdict": i % 2} for i, word in enumerate(WORDS)]
    )
    test = [{"review": f"{word} plot", "verdict": str(i % 2), "row": i} for i, word in enumerate(WORDS)]
    options = {"train_file": train, "test_file": write(tmp_path / "test.jsonl", test)}
    options |= {"validation_file": write(tmp_path / "validation.tsv", test[:5])}
    metrics = text_classification.main(flags(model_and_data | SHORT | options))
    assert {"eval_accuracy", "test_accuracy"} <= metrics.keys()


def test_metrics():
    wanted = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    logits = np.array([[2.0, -1.0], [1.0, -1.0], [-1.0, -1.0], [3.0, -1.0]])
    found = problems.micro_and_macro_f1(EvalPrediction(logits, wanted))
    assert found == pytest.approx({"f1_micro": 6 / 7, "f1_macro": 0.5})
    numbers, values = np.array([1.0, 2.0, 4.0], np.float32), np.array([[1.0], [2.0], [3.0]], np.float32)
    found = problems.error_and_correlations(EvalPrediction(values, numbers))
    assert found == pytest.approx({"mse": 1 / 3, "pearson": 0.98198, "spearman": 1.0}, rel=1e-4)
    found = problems.error_and_correlations(EvalPrediction(np.ones((3, 1)), numbers))
    assert found == {"mse": pytest.approx(10 / 3), "pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("feature", "labels", "metric"),
    [
        (Value("double"), [i / 20 for i in range(20)], "test_mse"),
        (List(ClassLabel(names=["dark", "bright"])), [[i % 2] for i in range(19)] + [[0, 1]], "test_f1_micro"),
    ],
)
def test_numbers_and_several_classes_of_images(images, tmp_path, feature, labels, metric):
    rows = {"image": [np.full((16, 16), 10 * i, np.uint8) for i in range(20)], "label": labels}
    Dataset.from_dict(rows, Features({"image": ImageFeature(), "label": feature})).to_parquet(tmp_path / "a.parquet")
    files = {"train_dir": "", "train_file": str(tmp_path / "a.parquet"), "test_file": str(tmp_path / "a.parquet")}
    model = test_image_classification.saved("vit", tmp_path / "vit")
    metrics = image_classification.main(flags(images | model | files | {"max_steps": "2"}))
    assert metric in metrics
    assert metrics["top_eigenvalue"] != 0


@pytest.mark.parametrize("option", ["train_dir", "train_file"])
def test_a_folder_of_images_for_each_split(images, tmp_path, option):
    """The test folder has one of the two classes, whose number is the training data's all the same."""
    folder = tmp_path / "held_out" / "dark"
    folder.mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.full((16, 16), 50 + i, np.uint8)).save(folder / f"{i}.png")
    model = test_image_classification.saved("vit", tmp_path / "vit")
    data = {option: images.pop("train_dir"), option.replace("train", "test"): str(folder.parent)}
    metrics = image_classification.main(flags(images | model | data | {"optimizer_mode": "trainer"}))
    assert metrics["test_accuracy"] == 1
    (folder.parent / "bird").mkdir()
    (folder / "0.png").rename(folder.parent / "bird" / "0.png")
    with pytest.raises(ValueError, match=r"'label' holds 'bird' in row 1 of .*held_out, which is no class of .*images"):
        image_classification.main(flags(images | model | data))

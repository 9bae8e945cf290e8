"""A mistake in options, files or rows is one line that names it, and a true bug keeps its traceback."""

import json
import re
import subprocess
import sys

import causal_lm
import common
import image_classification
import numpy as np
import pytest
import sft
import text_classification
from datasets import Dataset, Features, Image, Value
from parsing import parse_arguments
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    TrainingArguments,
)

from hf_xsam import XSAMConfig
from tests.recipes import test_image_classification, test_language_models, test_text_classification
from tests.recipes.test_text_classification import RECIPES, flags

texts = test_text_classification.model_and_data
language = test_language_models.model_and_data
images = test_image_classification.options
ROWS = [("good film", "yes"), ("bad plot", "no")] * 15


def refused(recipe, options, *settings):
    """Return the line with which a recipe ends."""
    with pytest.raises(ValueError) as ended:  # noqa: PT011
        recipe.main([*map(str, settings), *flags({name: str(value) for name, value in options.items()})])
    assert type(ended.value).__name__ == "InputError", ended.value
    assert "\n" not in str(ended.value)
    return str(ended.value)


def rows_of(*changed, separator=","):
    """Return the lines of a file: `ROWS` under a header, with other lines at some places, counted from 1."""
    rows = [separator.join(row) for row in ROWS]
    for number, line in changed:
        rows[number - 1] = line
    return "\n".join([separator.join(("review", "verdict")), *rows])


def jsonl(*changed):
    rows = [json.dumps({"review": text, "verdict": label}) for text, label in ROWS]
    for number, line in changed:
        rows[number - 1] = line
    return "\n".join(rows)


FILES = {
    "empty.csv": ("", "is empty"),
    "blank.jsonl": ("\n\n", "has no rows"),
    "header.csv": ("review,verdict\n", "has a header and no rows"),
    "list.json": ("[]", "has no rows"),
    "cells.csv": (rows_of((7, "dull,film,no")), "cannot be read: .*Expected 2 fields in line 8, saw 3"),
    "few.csv": (rows_of((7, "dull")), "'verdict' has no label in row 7 of .*few.csv"),
    "quote.csv": (rows_of((7, '"dull,no')), "cannot be read: the quote that opens in line 8 does not close"),
    "no_text.csv": (rows_of((7, ",no")), "'review' holds None, not a text, in row 7 of .*no_text.csv"),
    "number.jsonl": (jsonl((7, '{"review": 3, "verdict": "no"}')), "'review' holds 3, not a text, in row 7 of .*jsonl"),
    "broken.jsonl": (jsonl((7, '{"review": "dull", "verdict": "no"')), "cannot be read in line 7: "),
    "broken.json": ('[{"review": "good", "verdict": "yes"},\n{"review": "bad"', "cannot be read in line 2: "),
    "no_label.jsonl": (jsonl((7, '{"review": "dull"}')), "'verdict' has no label in row 7 of .*no_label.jsonl"),
    "corrupt.parquet": ("PAR1", "cannot be read: "),
    "late.csv": (
        "review,verdict\n" + "good film,1\nbad film,2\n" * 6000 + "bad,2.5\n",
        "cannot be read in line 12002: .*2.5",
    ),
    "numbers.csv": ("review,verdict\n" + "3,yes\n4,no\n" * 9, "'review' holds 3, not a text, in row 1 .*json file"),
    "one_class.csv": ("review,verdict\n" + "good,yes\n" * 20, "holds one value alone in all 20 rows .*yes"),
    "constant.csv": ("review,verdict\n" + "good,0.5\n" * 20, "holds one value alone in all 20 rows"),
    "single.csv": ("review,verdict\ngood,yes\n", "holds one value alone in all 1 rows"),
    "ids.csv": (
        "review,verdict\n" + "".join(f"good,id{i}\n" for i in range(30)),
        "30 different values in 30 rows .*problem_type",
    ),
    "half.csv": (
        "review,verdict\n" + "".join(f"good,0.{i}\n" for i in range(1, 30)) + "good,n/a\n",
        "holds 'n/a' in row 30 of .*, among numbers such as 0.1: correct it; if they are classes, pass --problem_type",
    ),
    "infinite.csv": ("review,verdict\ngood,0.5\nbad,inf\ngood,0.7\n", "holds inf in row 2 of .*, not a finite number"),
    "notes.txt": ("good", r"it must end in \.csv, \.tsv, \.json, \.jsonl, \.parquet\."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_does_not_do(texts, tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_text(content)
    said = refused(text_classification, texts | {"train_file": tmp_path / name})
    assert name in said
    assert re.search(message, said), said


def test_other_encodings_and_missing_files(texts, tmp_path):
    (tmp_path / "latin.csv").write_bytes(rows_of((7, "caf\xe9,no")).encode("latin-1"))
    said = refused(text_classification, texts | {"train_file": tmp_path / "latin.csv"})
    assert "latin.csv', which is not UTF-8 in line 8: save it in that encoding." in said
    said = refused(text_classification, texts | {"test_file": tmp_path / "nowhere.csv"})
    assert re.search(r"test_file is '.*nowhere\.csv', and there is no such file\.", said)
    assert "which is a folder; name a file" in refused(text_classification, texts | {"train_file": tmp_path})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"review": [1, 2], "verdict": ["yes", "no"]}, "'review' holds 1, not a text, in row 1 of .*test.parquet"),
        ({"review": ["good", "bad"], "verdict": [1, 0]}, "'verdict' holds '1' in row 1 of .*test.parquet, which is no"),
        ({"review": ["good", "bad"]}, "label_column is 'verdict'; .*test.parquet has review"),
        ({"review": ["good", "bad"], "verdict": ["yes", None]}, "'verdict' has no label in row 2 of .*test.parquet"),
    ],
)
def test_a_test_file_of_other_types(texts, tmp_path, rows, message):
    Dataset.from_dict(rows).to_parquet(tmp_path / "test.parquet")
    said = refused(text_classification, texts | {"test_file": tmp_path / "test.parquet"})
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "imdb"}, "dataset_name is 'imdb' and train_file is '.*': name one of them"),
        ({"train_file": ""}, "test_file is '.*', and there is no train_file"),
        (
            {"model_name_or_path": "nowhere/model"},
            "model_name_or_path is 'nowhere/model', neither a folder nor a model",
        ),
        ({"model_name_or_path": RECIPES}, "model_name_or_path is '.*recipes': "),
        ({"rho": "-1"}, "rho is -1.0; it must"),
        ({"rho": "small"}, "argument --rho: invalid float value: 'small'"),
        ({"learningrate": "1"}, "unrecognized option --learningrate: did you mean learning_rate?"),
        ({"problem_type": "regression"}, "'verdict' holds 'yes' in row 1 of .*, not a number"),
        ({"early_stopping_patience": "2"}, "early_stopping_patience is 2, .*--load_best_model_at_end true"),
        ({"early_stopping_patience": "0"}, "early_stopping_patience is 0; it must be at least 1"),
    ],
)
def test_options_that_do_not_do(texts, options, message):
    assert re.search(message, refused(text_classification, texts | options))


def test_a_metric_of_which_less_is_better(language):
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    best |= {"metric_for_best_model": "perplexity"}
    said = refused(causal_lm, language | best)
    assert "metric_for_best_model is 'perplexity', of which less is better: add --greater_is_better false." in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rho: small", r"a\.yaml sets rho to 'small': argument --rho: invalid float value: 'small'\."),
        ("rho: [1]", r"a\.yaml sets rho to \[1\]: .*invalid float value"),
        ("optimizer_mode: sgd", r"a\.yaml sets optimizer_mode to 'sgd': .*invalid choice: 'sgd'"),
        ("learnig_rate: 1", r"a\.yaml sets learnig_rate, which no option .*: did you mean learning_rate\?"),
        ("zzzz: 1", r"a\.yaml sets zzzz, which no option .*; --help lists them"),
        ("rho: [", r"a\.yaml cannot be read as YAML: .*line 1"),
    ],
)
def test_yaml_that_does_not_do(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    assert re.search(message, refused(text_classification, {}, tmp_path / "a.yaml"))
    assert "nowhere.yaml cannot be read as YAML" in refused(text_classification, {}, tmp_path / "nowhere.yaml")


def test_yaml_values_become_their_options_type(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "learning_rate: 2e-5\nuse_cpu: true\nreport_to: [tensorboard]\nmax_steps: 3\nlr_scheduler_kwargs: {a: 1}\n"
        "label_names: [labels]\nmax_train_samples: null\n"
    )
    recipe, args, _ = parse_arguments(
        (text_classification.TextArguments, TrainingArguments, XSAMConfig), [str(tmp_path / "a.yaml")]
    )
    assert (args.learning_rate, args.use_cpu, args.max_steps) == (2e-5, True, 3)
    assert (args.report_to, args.lr_scheduler_kwargs, args.label_names) == (["tensorboard"], {"a": 1}, ["labels"])
    assert recipe.max_train_samples is None


def test_an_output_folder_that_cannot_be_written(texts, tmp_path):
    (tmp_path / "file").write_text("")
    said = refused(text_classification, texts | {"output_dir": tmp_path / "file" / "output"})
    assert re.search("output_dir is '.*file/output', and '.*file' cannot be written: Not a directory", said)


def test_checkpoints_that_do_not_fit(texts, tmp_path):
    folder = tmp_path / "other"
    sizes = {"vocab_size": 13, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    DistilBertForSequenceClassification(DistilBertConfig(**sizes)).save_pretrained(folder)
    said = refused(text_classification, texts | {"resume_from_checkpoint": folder})
    assert "a checkpoint of a distilbert model, and this one is a bert: name a checkpoint of this run" in said
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=13, **sizes)).save_pretrained(folder)
    said = refused(text_classification, texts | {"resume_from_checkpoint": folder})
    assert re.search("resume_from_checkpoint is '.*other', which does not fit: .*size mismatch", said)
    said = refused(text_classification, texts | {"resume_from_checkpoint": tmp_path / "nowhere"})
    assert re.search("resume_from_checkpoint is '.*nowhere', which does not fit: .*checkpoint", said)


@pytest.mark.parametrize("recipe", [causal_lm, sft])
def test_a_tokenizer_without_an_end(language, recipe):
    tokenizer = AutoTokenizer.from_pretrained(language["model_name_or_path"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(language["model_name_or_path"])
    said = refused(recipe, language | {"bf16": "false"})
    assert re.search("The tokenizer of '.*model' has no end-of-sequence token, .*save_pretrained", said)


@pytest.mark.parametrize("recipe", [causal_lm, sft])
def test_rows_of_language_models(language, tmp_path, recipe):
    (tmp_path / "texts.jsonl").write_text('{"text": "a good film"}\n{"text": null}\n{"text": "a bad film"}\n')
    options = language | {"bf16": "false", "test_file": tmp_path / "texts.jsonl"}
    said = refused(recipe, options | {"train_file": tmp_path / "texts.jsonl"})
    assert re.search(r"Column 'text' holds None, not a text, in row 2 of .*texts\.jsonl", said)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": []}\n')
    said = refused(recipe, options | {"train_file": tmp_path / "chats.jsonl"})
    assert re.search(r"Column 'messages' holds \[\], not messages with a role, in row 2 of .*chats\.jsonl", said)
    (tmp_path / "other.csv").write_text("review\na\nb\n")
    assert "other.csv has review" in refused(recipe, options | {"train_file": tmp_path / "other.csv"}).replace(
        "; it", ""
    )


def test_images_that_do_not_do(images, tmp_path):
    (tmp_path / "images" / "dark" / "0.png").write_bytes(b"no image")
    said = refused(image_classification, images)
    assert re.search(r"no image that can be read in row \d+ of .*images \(.*dark/0\.png\): cannot identify", said)
    whole = (tmp_path / "images" / "dark" / "1.png").read_bytes()
    (tmp_path / "images" / "dark" / "0.png").write_bytes(whole[:-30])
    assert re.search(r"dark/0\.png\): .*truncated", refused(image_classification, images))
    (tmp_path / "empty").mkdir()
    said = refused(image_classification, images | {"train_dir": tmp_path / "empty"})
    assert re.search("train_dir is '.*empty', which cannot be read as a folder with one folder of images a class", said)
    said = refused(image_classification, images | {"train_dir": tmp_path / "images" / "bright"})
    assert re.search(r"'label' holds one value alone in all 20 rows of .*bright \(bright\)", said)
    said = refused(image_classification, images | {"train_file": tmp_path / "images"})
    assert "train_dir and train_file are both set: name one of them." in said
    said = refused(image_classification, {**images, "train_dir": "", "validation_dir": tmp_path / "images"})
    assert "and there is no train_file" in said


def test_missing_images_are_named_by_their_row(images, tmp_path):
    rows = {"image": [None if i == 4 else np.full((16, 16), i, np.uint8) for i in range(20)], "label": ["a", "b"] * 10}
    Dataset.from_dict(rows, Features({"image": Image(), "label": Value("string")})).to_parquet(tmp_path / "a.parquet")
    said = refused(image_classification, images | {"train_dir": "", "train_file": tmp_path / "a.parquet"})
    assert re.search(r"no image that can be read in row 5 of .*a\.parquet: there is none", said)


def test_a_run_ends_with_one_line_and_a_bug_with_its_traceback(texts, tmp_path):
    (tmp_path / "broken.jsonl").write_text(jsonl((7, "{")))
    command = [
        sys.executable,
        RECIPES / "text_classification.py",
        *flags(texts | {"train_file": tmp_path / "broken.jsonl"}),
    ]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    line = (
        r"text_classification\.py: error: train_file is '.*', which cannot be read in line 7: JSON parse error: [\w ]+"
    )
    assert re.fullmatch(line, ended.stderr.splitlines()[-1])

    def bug():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        common.run(bug)

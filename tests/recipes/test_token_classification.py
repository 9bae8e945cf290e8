"""The recipe in all three modes on a tiny model, and its embedded data."""

import json

import pytest
import token_classification
import torch
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

from hf_xsam.data.movie_words import load_movie_words
from tests.helpers import TINY, WORDS, save_tiny_classifier

TAGS = ["praise"] * 3 + ["blame"] * 3 + ["thing"] * 2


@pytest.fixture
def model_and_data(tmp_path):
    """Return the options that name a tiny model and a json file of tagged words."""
    save_tiny_classifier(tmp_path / "model")
    torch.manual_seed(0)
    BertForTokenClassification(BertConfig(vocab_size=18, **TINY)).save_pretrained(tmp_path / "model")
    with (tmp_path / "train.json").open("w") as file:
        for i in range(64):
            chosen = [i % 6, 6 + i % 2, (i * 5) % 8]
            row = {"words": [WORDS[k] for k in chosen], "kinds": [TAGS[k] for k in chosen]}
            file.write(json.dumps(row) + "\n")
    data = str(tmp_path / "train.json")
    options = {"model_name_or_path": tmp_path / "model", "train_file": data, "test_file": data}
    options |= {"tokens_column": "words", "tags_column": "kinds", "output_dir": tmp_path / "output", "rho": 0.01}
    options |= {"learning_rate": 0.01, "num_train_epochs": 6, "use_cpu": True, "report_to": "none", "logging_steps": 5}
    return {name: str(value) for name, value in (options | {"save_strategy": "no"}).items()}


def flags(options):
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("mode", ["trainer", "sam", "xsam"])
def test_learns_in_each_mode(model_and_data, mode, capsys):
    metrics = token_classification.main(flags(model_and_data | {"optimizer_mode": mode}))
    assert metrics["test_accuracy"] > 0.9
    assert metrics["test_f1"] > 0.9
    assert metrics["top_eigenvalue"] > 0
    assert f"{mode} on" in capsys.readouterr().out
    saved = BertForTokenClassification.from_pretrained(model_and_data["output_dir"])
    assert saved.config.id2label == {0: "blame", 1: "praise", 2: "thing"}


def test_tags_are_of_each_words_first_token(model_and_data):
    tokenizer = AutoTokenizer.from_pretrained(model_and_data["model_name_or_path"])
    batch = {"words": [["good", "film:plot"], ["dull"]], "kinds": [["praise", "thing"], ["blame"]]}
    number_of = {"blame": 0, "praise": 1, "thing": 2}
    encoded = token_classification.encode_words(batch, tokenizer, ("words", "kinds"), number_of, max_length=5)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0]) == ["[CLS]", "good", "film", ":", "[SEP]"]
    assert encoded["labels"] == [[-100, 1, 2, -100, -100], [-100, 0, -100]]


def test_a_missing_column_and_an_unknown_tag_are_named(model_and_data, tmp_path):
    with pytest.raises(ValueError, match="tags_column is 'tags'; .*train.json has words, kinds"):
        token_classification.main(flags(model_and_data | {"tags_column": "tags"}))
    (tmp_path / "other.json").write_text(json.dumps({"words": ["good"], "kinds": ["fame"]}) + "\n")
    with pytest.raises(ValueError, match="Column 'kinds' holds 'fame', which is no tag of the training data"):
        token_classification.main(flags(model_and_data | {"validation_file": str(tmp_path / "other.json")}))


def test_the_embedded_words():
    words = load_movie_words()
    assert {name: len(split) for name, split in words.items()} == {"train": 8484, "validation": 1060, "test": 1061}
    row = words["train"][2]
    assert row["tokens"][:4] == ["Although", "it", "tries", "to"]
    assert len(row["tokens"]) == len(row["tags"])
    tagged = {
        token.lower(): tag for row in words["test"] for token, tag in zip(row["tokens"], row["tags"], strict=True)
    }
    names = words["train"].features["tags"].feature.names
    assert [names[tagged[word]] for word in ("awful", "the", "beautiful")] == ["negative", "neutral", "positive"]

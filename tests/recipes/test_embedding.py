"""The recipe in all modes and losses on a tiny model."""

import csv
import json
from pathlib import Path

import embedding
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel

from hf_xsam import XSAMConfig
from tests.helpers import TINY, WORDS, save_tiny_classifier

GOOD, BAD = WORDS[:3], WORDS[3:6]


@pytest.fixture
def model_and_data(tmp_path):
    """Return the options that name a tiny model and a csv file of pairs, alike if both are good or both bad."""
    save_tiny_classifier(tmp_path / "bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=18, **TINY)).save_pretrained(tmp_path / "bert")
    words = Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[words, Pooling(16)], device="cpu").save(str(tmp_path / "model"))
    with (tmp_path / "pairs.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "alike"])
        for i in range(60):
            one, other = (GOOD + BAD)[i % 6], (GOOD + BAD)[(i * 5 + i // 6) % 6]
            writer.writerow([f"{one} film", f"{other} plot", float((one in GOOD) == (other in GOOD))])
    data = str(tmp_path / "pairs.csv")
    options = {"model_name_or_path": tmp_path / "model", "train_file": data, "test_file": data}
    options |= {"text_column": "question", "text_pair_column": "answer", "score_column": "alike", "rho": 0.01}
    options |= {"output_dir": tmp_path / "output", "learning_rate": 0.01, "num_train_epochs": 3, "logging_steps": 5}
    options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "eigenvalue_samples": 8}
    return {name: str(value) for name, value in options.items()}


def flags(options):
    return [part for name, value in options.items() for part in (f"--{name}", *value.split())]


@pytest.mark.parametrize("mode", ["trainer", "sam", "xsam"])
def test_learns_in_each_mode(model_and_data, mode, capsys):
    metrics = embedding.main(flags(model_and_data | {"optimizer_mode": mode}))
    assert metrics["test_spearman_cosine"] > metrics["test_spearman_cosine_before"] + 0.2
    assert metrics["top_eigenvalue"] != 0
    said = capsys.readouterr().out
    assert f"{mode} on" in said
    assert ("xsam/rayleigh_quotient" in said) == (mode == "xsam")
    assert f"{metrics['test_spearman_cosine']:.4f} after" in said
    output = Path(model_and_data["output_dir"])
    assert (
        json.loads((output / "all_results.json").read_text())["test_spearman_cosine"] == metrics["test_spearman_cosine"]
    )
    assert SentenceTransformer(str(output), device="cpu").encode("good film").shape == (16,)
    if mode != "trainer":
        assert XSAMConfig.from_pretrained(output).rho == 0.01


@pytest.mark.parametrize("loss", ["cosent", "ranking", "cached_ranking"])
def test_each_loss(model_and_data, loss):
    options = {"loss": loss, "matryoshka_dims": "16 8", "max_steps": "3", "per_device_train_batch_size": "4"}
    metrics = embedding.main(flags(model_and_data | options))
    name = "test_spearman_cosine" if loss == "cosent" else "test_cosine_ndcg@10"
    assert 0 < metrics[name] <= 1
    assert metrics["top_eigenvalue"] != 0


def test_a_missing_column_is_named(model_and_data):
    with pytest.raises(ValueError, match="score_column is 'score'; .*pairs.csv has question, answer, alike"):
        embedding.main(flags(model_and_data | {"score_column": "score"}))


def test_the_embedded_pairs():
    pairs = embedding.movie_pairs()
    assert {name: len(split) for name, split in pairs.items()} == {"train": 4242, "validation": 530, "test": 530}
    assert set(pairs["test"]["score"]) == {0.0, 1.0}

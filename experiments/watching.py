"""What is measured of a classifier along its training and at its end: loss, accuracy and calibration."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

BINS = 15
Batches = Sequence[Mapping[str, Tensor]]


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean of |accuracy - confidence| over bins of equal width, by size.

    Args:
        logits: examples x classes.
        labels: of the examples.
        bins: that the interval from 0 to 1 of the confidence is cut into, (0, 1/bins], (1/bins, 2/bins], ...

    Returns:
        From 0 to 1; nan for logits that are not finite.
    """
    if not torch.isfinite(logits).all():
        return math.nan
    confidence, predicted = logits.double().softmax(-1).max(-1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (predicted == labels).double() - confidence
    sums = torch.zeros(bins, dtype=gap.dtype).index_add_(0, place, gap)
    return (sums.abs().sum() / len(labels)).item()


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean negative log-likelihood, as `loss`, the accuracy and the calibration error."""
    return {
        "loss": nn.functional.cross_entropy(logits.double(), labels).item(),
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "ece": calibration_error(logits, labels),
    }


def collated(trainer: Trainer, examples: Any) -> Batches:
    """Return the examples in the trainer's batches for evaluation, in their order."""
    size = trainer.args.per_device_eval_batch_size
    return [
        trainer.data_collator([examples[i] for i in range(start, min(start + size, len(examples)))])
        for start in range(0, len(examples), size)
    ]


@torch.no_grad()
def logits_of(model: nn.Module, batches: Batches) -> Tensor:
    """Return the model's logits in evaluation mode; its mode stays as it was."""
    training = model.training
    model.eval()
    logits = torch.cat([model(**batch)["logits"] for batch in batches])
    model.train(training)
    return logits


def labels_of(batches: Batches) -> Tensor:
    """Return the labels of the batches."""
    return torch.cat([batch["labels"] for batch in batches])


def scores_of(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Return the model's scores on the batches."""
    return scores(logits_of(model, batches), labels_of(batches))


class Watch(TrainerCallback):
    """Scores the model after each epoch, on named batches; `wrong_validation` is `validation` with other labels.

    Attributes:
        curves: a list over the epochs of each score, by the batches' name and the score's.
        seconds, cpu_seconds, forward_passes: what it took, which is no part of the training's cost.
    """

    def __init__(self, batches: Mapping[str, Batches], wrong_labels: Sequence[int] | None = None) -> None:
        self.batches, self.wrong_labels = batches, wrong_labels
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.seconds = self.cpu_seconds = 0.0
        self.forward_passes = 0

    def on_epoch_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Score it."""
        start, cpu_start = time.monotonic(), time.process_time()
        for name, batches in self.batches.items():
            logits = logits_of(model, batches)
            self._keep(name, logits, labels_of(batches))
            if name == "validation" and self.wrong_labels is not None:
                self._keep("wrong_validation", logits, torch.tensor(self.wrong_labels))
            self.forward_passes += len(batches)
        self.seconds += time.monotonic() - start
        self.cpu_seconds += time.process_time() - cpu_start

    def _keep(self, name: str, logits: Tensor, labels: Tensor) -> None:
        for score, value in scores(logits, labels).items():
            self.curves.setdefault(name, {}).setdefault(score, []).append(round(value, 5))

"""What a benchmark trains: a model, examples and settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

SEED = 0


@dataclass
class Workload:
    """What to train, how, and the rho that SAM and X-SAM take on it.

    Attributes:
        model: makes the model, the same at each call.
        dataset: the training examples.
        collator: makes batches of them; None is the Trainer's own.
        rho: radius of the perturbation.
        batch_size: examples a step.
        optimizer: settings of `TrainingArguments`.
        reference_size: examples whose top eigenvector the estimates are compared with.
        reference_hvp: how its products are computed; finite differences are exact enough on smooth models, in
            evaluation mode, at a third of the cost.
    """

    model: Callable[[], nn.Module]
    dataset: Dataset | Sequence[dict[str, Any]]
    collator: Callable[[list[dict]], dict[str, Tensor]] | None
    rho: float
    batch_size: int
    reference_size: int
    reference_hvp: str = "exact"
    optimizer: dict[str, Any] = field(default_factory=dict)

    def settings(self, output_dir: str, max_steps: int) -> dict[str, Any]:
        """Return the arguments for a trainer that trains a fresh model."""
        set_seed(SEED)
        args = TrainingArguments(
            output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=self.batch_size,
            seed=SEED,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **self.optimizer,
        )
        return {"model": self.model(), "args": args, "train_dataset": self.dataset, "data_collator": self.collator}

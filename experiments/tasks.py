"""The tasks: what each trains, on which data, and the few settings that are tried for every mode alike.

Train, validation and test examples are the same in every run. A run's seed decides the fresh weights, the order of
the data, dropout, and what a task draws from its training examples: which 500, or which labels are wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from preparing import Prepared, digits_cnn, digits_vit, movie_sentences, movie_text

MODES_OF_FIRST_TASKS = (
    *("stock", "sam", "paper", "paper_norm_kept", "projection", "aligned_0.5", "aligned_1", "aligned_2"),
    *("stock_long", "sam_long"),
)

# How v was estimated by default when the first five tasks were run, when the CNN with wrong labels was, and the others.
FIRST_ESTIMATE = {"eigen_interval": 10, "eigen_batch_fraction": 0.5, "eigen_momentum": 0.3}
SECOND_ESTIMATE = {"eigen_interval": 5, "eigen_batch_fraction": 0.25, "eigen_momentum": 0.7}
THIRD_ESTIMATE = {"eigen_interval": 4, "eigen_batch_fraction": 0.25, "eigen_momentum": 0.8}

MODES_OF_LATER_TASKS = (
    *("stock", "sam", "paper", "projection", "aligned_0.5", "one_pass", "one_pass_differences"),
    *("sam_late_0.5", "sam_late_0.7", "sam_late_0.9", "one_pass_late_0.5", "one_pass_late_0.7", "one_pass_late_0.9"),
    *("paper_random", "projection_random", "one_pass_random", "stock_long", "sam_long"),
)


@dataclass(frozen=True)
class Task:
    """A task and its protocol.

    Attributes:
        prepare: builds model and data from a run's seed.
        arguments: of `TrainingArguments`, apart from the learning rate.
        metric, greater_is_better: what is reported, and which way is better.
        learning_rate, rho: of the runs that tune nothing.
        learning_rates, rhos: the grid of each mode but the stock optimizer; a mode may multiply the rhos.
        late_learning_rates: in their place for a mode that starts late, whose first steps are the stock optimizer's.
        stock_learning_rates: as many for the stock optimizer, which has no rho, as the grid has points.
        xsam: fields of `XSAMConfig` that the task sets for all these modes.
        modes: that are run when none is named.
        watched: whether a classifier is scored after each epoch, and under damage at the end.
        tuning_seeds: that the grid is tried with; the reported runs have others. Empty where nothing is chosen and all
            of the grid is reported, a sweep.
        widenings: how often the grid gets one more value at each end that a mode's best point is at.
        train_sample: training examples that the final training loss is measured on, the first ones.
        curvature_sample: training examples that the final top eigenvalue is measured on, the first ones.
        curvature_hvp: how its products are computed. Finite differences cost half, and are exact enough on MiniLM.
        mean_loss: whether the model's loss is a mean over a batch, whatever its `forward(**kwargs)` suggests.
    """

    prepare: Callable[[int], Prepared]
    arguments: Mapping[str, Any]
    learning_rate: float
    rho: float
    learning_rates: Sequence[float]
    rhos: Sequence[float]
    stock_learning_rates: Sequence[float]
    train_sample: int
    curvature_sample: int
    curvature_hvp: str = "exact"
    late_learning_rates: Sequence[float] = ()
    tuning_seeds: Sequence[int] = (100, 101)
    widenings: int = 0
    metric: str = "accuracy"
    greater_is_better: bool = True
    xsam: Mapping[str, Any] = field(default_factory=dict)
    mean_loss: bool = True
    modes: Sequence[str] = MODES_OF_FIRST_TASKS
    watched: bool = False

    @property
    def swept(self) -> bool:
        """Whether all of the grid is reported."""
        return not self.tuning_seeds


MOVIES: dict[str, Any] = {
    "learning_rate": 1e-4,
    "rho": 0.01,
    "learning_rates": (5e-5, 1e-4, 2e-4),
    "rhos": (0.005, 0.02),
    "stock_learning_rates": (2e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 4e-4),
    "train_sample": 500,
    "curvature_sample": 64,
    "curvature_hvp": "finite_difference",
}


def movie_arguments(epochs: int, batch_size: int) -> dict[str, Any]:
    """Return the recipe's settings, with other epochs and batches."""
    return {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,  # a fraction of all steps
        "train_sampling_strategy": "group_by_length",
    }


VIT: dict[str, Any] = {
    "learning_rate": 1e-3,
    "stock_learning_rates": (2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3),
    "train_sample": 1077,
    "curvature_sample": 512,
}


def vit_arguments(epochs: int) -> dict[str, Any]:
    """Return the recipe's settings, with other epochs."""
    return {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 512,
        "warmup_steps": 0.1,
    }


CNN_ARGUMENTS = {
    "num_train_epochs": 40,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 512,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 5e-4,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.0,  # no clipping: the gradient's norm is part of what is compared
}

CNN: dict[str, Any] = {"learning_rate": 0.05, "train_sample": 1077, "curvature_sample": 1077}

# Of the tasks that ask where flatness pays: wrong labels, which a long training learns by heart.
WRONG_LABELS: dict[str, Any] = {"modes": MODES_OF_LATER_TASKS, "watched": True, "tuning_seeds": (100,), "widenings": 2}
CNN_WRONG_LABELS: dict[str, Any] = {
    "arguments": CNN_ARGUMENTS,
    "rho": 0.1,
    # Widened twice: of 0.02 and 0.05 times 0.05, 0.1 and 0.2, the best was at an end, and so was the stock optimizer's,
    # then again with 0.01 and 0.4.
    "learning_rates": (0.005, 0.01, 0.02, 0.05),
    "late_learning_rates": (0.0005, 0.001, 0.002, 0.005),
    "rhos": (0.1, 0.2, 0.4),
    "stock_learning_rates": (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2),
    "xsam": SECOND_ESTIMATE,
    **CNN,
    **WRONG_LABELS,
}

MOVIE_TEXT = Task(
    movie_text,
    {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "warmup_steps": 0.1,
    },
    learning_rate=1e-3,
    rho=0.01,
    learning_rates=(5e-4, 1e-3, 2e-3),
    rhos=(0.003, 0.01),
    stock_learning_rates=(2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3),
    train_sample=16,
    curvature_sample=4,
    tuning_seeds=(100,),
    widenings=1,
    xsam=THIRD_ESTIMATE,
    metric="perplexity",
    greater_is_better=False,
    mean_loss=False,
    modes=("stock", "sam", "paper", "projection", "aligned_0.5", "stock_long", "sam_long"),
)


def forgetting_task(lora: bool, learning_rates: Sequence[float]) -> Task:
    """Return the task that asks what a finetuning on movie reviews forgets, at the same learning rates in each mode."""
    return replace(
        MOVIE_TEXT,
        prepare=partial(movie_text, lora=lora),
        learning_rates=learning_rates,
        rhos=(MOVIE_TEXT.rho,),
        stock_learning_rates=learning_rates,
        tuning_seeds=(),
        widenings=0,
        modes=("stock", "sam", "one_pass"),
    )


TASKS: dict[str, Task] = {
    "digits_cnn": Task(
        partial(digits_cnn, wrong=0.1),
        CNN_ARGUMENTS,
        rho=0.05,
        learning_rates=(0.01, 0.05, 0.2),
        rhos=(0.05, 0.1),
        stock_learning_rates=(0.005, 0.01, 0.03, 0.05, 0.1, 0.2),
        xsam=FIRST_ESTIMATE,
        **CNN,
    ),
    "digits_vit": Task(
        digits_vit,
        vit_arguments(epochs=20),
        rho=0.01,
        learning_rates=(5e-4, 1e-3, 2e-3),
        rhos=(0.01, 0.05),
        xsam=FIRST_ESTIMATE,
        **VIT,
    ),
    "movies_500": Task(
        partial(movie_sentences, train_samples=500),
        movie_arguments(epochs=2, batch_size=16),
        xsam={**FIRST_ESTIMATE, "rho_warmup_steps": 6},
        tuning_seeds=(100,),
        **MOVIES,
    ),
    "movies_noise": Task(
        partial(movie_sentences, train_samples=800, wrong=0.2),
        movie_arguments(epochs=3, batch_size=32),
        xsam={**FIRST_ESTIMATE, "rho_warmup_steps": 8},
        tuning_seeds=(100,),
        **MOVIES,
    ),
    "movies": Task(
        partial(movie_sentences, train_samples=2500),
        movie_arguments(epochs=1, batch_size=32),
        xsam={**FIRST_ESTIMATE, "rho_warmup_steps": 8},
        tuning_seeds=(100,),
        **MOVIES,
    ),
    "movie_text_lora": MOVIE_TEXT,
    "digits_cnn_wrong40": Task(partial(digits_cnn, wrong=0.4), **CNN_WRONG_LABELS),
    "digits_cnn_wrong60": Task(partial(digits_cnn, wrong=0.6), **CNN_WRONG_LABELS),
    "digits_vit_wrong40": Task(
        partial(digits_vit, wrong=0.4),
        vit_arguments(epochs=60),
        rho=0.05,
        learning_rates=(1e-3, 2e-3),
        rhos=(0.03, 0.06, 0.12),
        xsam=THIRD_ESTIMATE,
        **VIT,
        **WRONG_LABELS,
    ),
    "digits_cnn_long": Task(
        partial(digits_cnn, wrong=0.0),
        {**CNN_ARGUMENTS, "num_train_epochs": 100},
        rho=0.1,
        learning_rates=(0.02, 0.05, 0.1),
        rhos=(0.05, 0.1),
        stock_learning_rates=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
        tuning_seeds=(100,),
        widenings=1,
        xsam=THIRD_ESTIMATE,
        modes=(
            *("stock", "sam", "paper", "one_pass", "one_pass_differences", "one_pass_random"),
            *("stock_long", "sam_long"),
        ),
        **CNN,
    ),
    "movies_memorized": Task(
        partial(movie_sentences, train_samples=400, wrong=0.3, held_out=500),
        movie_arguments(epochs=12, batch_size=16),
        learning_rate=1e-4,
        rho=0.02,
        learning_rates=(5e-5, 1e-4),
        rhos=(0.01, 0.02, 0.05),
        stock_learning_rates=(2e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 4e-4),
        train_sample=400,
        curvature_sample=64,
        curvature_hvp="finite_difference",
        xsam={**THIRD_ESTIMATE, "rho_warmup_steps": 30},
        **WRONG_LABELS,
    ),
    "movie_text_forgetting_lora": forgetting_task(lora=True, learning_rates=(5e-4, 2e-3, 4e-3, 8e-3)),
    "movie_text_forgetting": forgetting_task(lora=False, learning_rates=(3e-5, 1e-4, 2e-4, 4e-4)),
}

"""The tasks: what each trains, on which data, and the few settings that are tried for every mode alike.

Train, validation and test examples are the same in every run. A run's seed decides the fresh weights, the order of
the data, dropout, and what a task draws from its training examples: which 500, or which labels are wrong.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

sys.path.append(str(Path(__file__).parent.parent / "recipes"))

import causal_lm
from datasets import Dataset, DatasetDict
from embedded import minilm_folder
from image_classification import accuracy, small_vit
from language_model import load_model, lora_config
from peft import get_peft_model
from text_classification import accuracy_and_f1

from hf_xsam.data.digits import digits
from hf_xsam.data.encoding import encode_language
from hf_xsam.data.movie_reviews import load_movie_reviews, movie_prompts
from hf_xsam.data.splits import SPLIT_SEED

Splits = Mapping[str, Sequence[dict] | Dataset]


@dataclass
class Prepared:
    """What a trainer is built from.

    Attributes:
        model: with the weights that training starts from.
        splits: `train`, `validation` and `test`, examples as the model takes them.
        settings: the trainer's other arguments, such as `data_collator` and `compute_metrics`.
    """

    model: nn.Module
    splits: Splits
    settings: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task and its protocol.

    Attributes:
        prepare: builds model and data from a run's seed.
        arguments: of `TrainingArguments`, apart from the learning rate.
        metric, greater_is_better: what is reported, and which way is better.
        learning_rate, rho: of the runs that tune nothing.
        learning_rates, rhos: the grid that is tried for each mode with SAM's perturbation.
        stock_learning_rates: as many for the stock optimizer, which has no rho, as the grid has points.
        xsam: fields of `XSAMConfig` that the task sets for all these modes.
        tuning_seeds: that the grid is tried with; the reported runs have others.
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
    tuning_seeds: Sequence[int] = (100, 101)
    metric: str = "accuracy"
    greater_is_better: bool = True
    xsam: Mapping[str, Any] = field(default_factory=dict)
    mean_loss: bool = True


def with_wrong_labels(labels: Sequence[int], share: float, classes: int, seed: int) -> list[int]:
    """Return `labels`, of which `share` (rounded to a whole number) are changed to another class, all alike likely."""
    generator = np.random.default_rng(seed)
    wrong = generator.choice(len(labels), size=round(share * len(labels)), replace=False)
    changed = np.array(labels)
    changed[wrong] = (changed[wrong] + generator.integers(1, classes, size=len(wrong))) % classes
    return changed.tolist()


def movie_sentences(seed: int, train_samples: int, wrong: float = 0.0) -> Prepared:
    """Prepare MiniLM with a fresh head for the movie reviews, on a choice of the training examples."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    splits = load_movie_reviews()
    train = splits["train"].shuffle(seed=seed).select(range(train_samples))
    columns = {"text": train["text"][:], "label": with_wrong_labels(train["label"][:], wrong, 2, seed)}
    splits["train"] = Dataset.from_dict(columns, features=train.features)

    def encode(batch: dict) -> dict:
        return {**tokenizer(batch["text"], truncation=True, max_length=40), "labels": batch["label"]}

    splits = splits.map(encode, batched=True, remove_columns=["text", "label"])
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), dtype="float32", num_labels=2)
    return Prepared(model, splits, {"processing_class": tokenizer, "compute_metrics": accuracy_and_f1})


def movie_text(seed: int) -> Prepared:
    """Prepare SmolLM2 with LoRA for sentences of movie reviews, joined and cut into pieces of 64 tokens."""
    recipe = causal_lm.CausalArguments(use_peft=True, lora_r=8, lora_alpha=16, packing=True, max_length=64)
    model, tokenizer = load_model(recipe)
    splits = movie_prompts().shuffle(seed=SPLIT_SEED)
    sizes = {"train": 256, "validation": 64, "test": 128}
    splits = DatasetDict({name: splits[name].select(range(size)) for name, size in sizes.items()})
    # Texts stay whole: packing cuts them.
    encode = partial(encode_language, tokenizer=tokenizer, columns=(recipe.text_column,), max_length=None)
    splits = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    splits = splits.map(causal_lm.pack, batched=True, fn_kwargs={"length": recipe.max_length})
    set_seed(seed)
    settings = {
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "compute_metrics": causal_lm.perplexity_and_accuracy,
        "preprocess_logits_for_metrics": causal_lm.token_losses,
    }
    return Prepared(get_peft_model(model, lora_config(recipe)), splits, settings)


def digit_splits(encode: Callable[[list], torch.Tensor], wrong: float, seed: int) -> dict[str, list[dict]]:
    """Return 1,077 training, 360 validation and 360 test digits, their images as `encode` makes them."""
    splits = digits()
    halves = splits["train"].train_test_split(test_size=len(splits["test"]), seed=SPLIT_SEED)
    examples = {}
    for name, split in {"train": halves["train"], "validation": halves["test"], "test": splits["test"]}.items():
        labels = with_wrong_labels(split["label"][:], wrong if name == "train" else 0.0, 10, seed)
        pixels = encode(split["image"][:])
        examples[name] = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    return examples


def digits_vit(seed: int) -> Prepared:
    """Prepare the small ViT, from scratch, for the digits."""
    set_seed(seed)
    model, processor = small_vit(num_labels=10)

    def encode(images: list) -> torch.Tensor:
        return processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    return Prepared(model, digit_splits(encode, 0.0, seed), {"compute_metrics": accuracy})


class SmallCNN(nn.Module):
    """Three convolutions with batch norm and ReLU for 8 x 8 images of one channel, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if inputs > 1 else []
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 10))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return loss and logits, as the Trainer takes them."""
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def digits_cnn(seed: int) -> Prepared:
    """Prepare the CNN, from scratch, for the digits, with every tenth training label wrong."""
    set_seed(seed)

    def encode(images: list) -> torch.Tensor:
        return torch.tensor(np.stack([np.asarray(image) for image in images])).float().unsqueeze(1) / 255

    return Prepared(SmallCNN(), digit_splits(encode, 0.1, seed), {"compute_metrics": accuracy})


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


TASKS: dict[str, Task] = {
    "digits_cnn": Task(
        digits_cnn,
        {
            "num_train_epochs": 40,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 512,
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "weight_decay": 5e-4,
            "lr_scheduler_type": "cosine",
            "max_grad_norm": 0.0,  # no clipping: the gradient's norm is part of what is compared
        },
        learning_rate=0.05,
        rho=0.05,
        learning_rates=(0.01, 0.05, 0.2),
        rhos=(0.05, 0.1),
        stock_learning_rates=(0.005, 0.01, 0.03, 0.05, 0.1, 0.2),
        train_sample=1077,
        curvature_sample=1077,
    ),
    "digits_vit": Task(
        digits_vit,
        {
            "num_train_epochs": 20,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 512,
            "warmup_steps": 0.1,
        },
        learning_rate=1e-3,
        rho=0.01,
        learning_rates=(5e-4, 1e-3, 2e-3),
        rhos=(0.01, 0.05),
        stock_learning_rates=(2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3),
        train_sample=1077,
        curvature_sample=512,
    ),
    "movies_500": Task(
        lambda seed: movie_sentences(seed, train_samples=500),
        movie_arguments(epochs=2, batch_size=16),
        xsam={"rho_warmup_steps": 6},
        tuning_seeds=(100,),
        **MOVIES,
    ),
    "movies_noise": Task(
        lambda seed: movie_sentences(seed, train_samples=800, wrong=0.2),
        movie_arguments(epochs=3, batch_size=32),
        xsam={"rho_warmup_steps": 8},
        tuning_seeds=(100,),
        **MOVIES,
    ),
    "movies": Task(
        lambda seed: movie_sentences(seed, train_samples=2500),
        movie_arguments(epochs=1, batch_size=32),
        xsam={"rho_warmup_steps": 8},
        tuning_seeds=(100,),
        **MOVIES,
    ),
    "movie_text_lora": Task(
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
        metric="perplexity",
        greater_is_better=False,
        mean_loss=False,
    ),
}

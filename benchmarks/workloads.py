"""The four models that the benchmarks train: BERT, ViT, a language model with LoRA, and a batch-norm CNN."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from workload import SEED, Workload

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from causal_lm import CausalArguments, pack
from embedded import minilm_folder
from language_model import load_model, lora_config
from peft import get_peft_model

from hf_xsam.data.encoding import encode_language
from hf_xsam.data.movie_reviews import load_movie_reviews


class ConvNet(nn.Module):
    """Three convolutions with batch norm and ReLU, for 8 x 8 images."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = [1, width, 2 * width, 2 * width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairwise(channels)
            ),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(channels[-1] * 4, 10),
        )

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean cross entropy and the logits."""
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert() -> Workload:
    """Return all-MiniLM-L6-v2 with a fresh head on sentences of movie reviews."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    train = load_movie_reviews()["train"]

    def encode(rows: dict) -> dict:
        return {**tokenizer(rows["text"], truncation=True, max_length=32), "labels": rows["label"]}

    def model() -> nn.Module:
        set_seed(SEED)
        return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), dtype="float32", num_labels=2)

    return Workload(
        model,
        train.map(encode, batched=True, remove_columns=train.column_names),
        DataCollatorWithPadding(tokenizer, padding="max_length", max_length=32),
        rho=0.01,
        batch_size=32,
        reference_size=256,
        reference_hvp="finite_difference",
        optimizer={"learning_rate": 1e-4, "warmup_steps": 0.1},
    )


def digits(label_noise: float = 0.0) -> Dataset:
    """Return scikit-learn's 8 x 8 digits, a share of the labels drawn anew."""
    data = load_digits()
    generator = np.random.default_rng(SEED)
    noisy = generator.random(len(data.target)) < label_noise
    labels = np.where(noisy, generator.integers(0, 10, len(data.target)), data.target)
    pixels = (data.images[:, None] / 8 - 1).astype(np.float32)
    return Dataset.from_dict({"pixel_values": pixels, "labels": labels}).with_format("torch")


def vit() -> Workload:
    """Return a small ViT from scratch on digits."""

    def model() -> nn.Module:
        set_seed(SEED)
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))

    return Workload(
        model,
        digits(),
        default_data_collator,
        rho=0.01,
        batch_size=64,
        reference_size=1024,
        optimizer={"learning_rate": 1e-3, "warmup_steps": 0.1},
    )


def llama() -> Workload:
    """Return SmolLM2-135M-Instruct with LoRA on packed sentences of movie reviews."""
    recipe = CausalArguments(use_peft=True, lora_r=8, lora_alpha=16, max_length=64, packing=True)
    _, tokenizer = load_model(recipe)
    train = load_movie_reviews()["train"].select(range(1500)).remove_columns("label")
    options = {"tokenizer": tokenizer, "columns": ("text",), "max_length": None}
    train = train.map(encode_language, fn_kwargs=options, batched=True, remove_columns="text")
    train = train.map(pack, fn_kwargs={"length": recipe.max_length}, batched=True)

    def model() -> nn.Module:
        set_seed(SEED)
        return get_peft_model(load_model(recipe)[0], lora_config(recipe))

    return Workload(
        model,
        train.filter(lambda row: len(row["input_ids"]) == recipe.max_length),
        DataCollatorForSeq2Seq(tokenizer),
        rho=0.01,
        batch_size=4,
        reference_size=16,
        reference_hvp="finite_difference",
        optimizer={"learning_rate": 1e-3, "warmup_steps": 0.1},
    )


def cnn() -> Workload:
    """Return a CNN with batch norm from scratch on digits, a tenth of whose labels are noise."""

    def model() -> nn.Module:
        set_seed(SEED)
        return ConvNet()

    return Workload(
        model,
        digits(label_noise=0.1),
        default_data_collator,
        rho=0.05,
        batch_size=64,
        reference_size=1024,
        optimizer={
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
        },
    )


WORKLOADS = {"bert": bert, "vit": vit, "llama": llama, "cnn": cnn}

"""Model and data of each task, built from a run's seed."""

import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
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
from hf_xsam.data.movie_reviews import INNER, cached_archive, load_movie_reviews, movie_prompts
from hf_xsam.data.splits import SPLIT_SEED

PRODUCTS = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"

Splits = Mapping[str, Sequence[dict] | Dataset]


@dataclass
class Prepared:
    """What a trainer is built from.

    Attributes:
        model: with the weights that training starts from.
        splits: `train`, `validation` and `test`, examples as the model takes them; `elsewhere` of another domain.
        settings: the trainer's other arguments, such as `data_collator` and `compute_metrics`.
        wrong_labels: of the validation examples, as many of them wrong as of the training examples.
    """

    model: nn.Module
    splits: Splits
    settings: dict[str, Any]
    wrong_labels: Sequence[int] | None = None


def with_wrong_labels(labels: Sequence[int], share: float, classes: int, seed: int) -> list[int]:
    """Return `labels`, of which `share` (rounded to a whole number) are changed to another class, all alike likely."""
    generator = np.random.default_rng(seed)
    wrong = generator.choice(len(labels), size=round(share * len(labels)), replace=False)
    changed = np.array(labels)
    changed[wrong] = (changed[wrong] + generator.integers(1, classes, size=len(wrong))) % classes
    return changed.tolist()


def product_reviews(count: int) -> Dataset:
    """Return `count` sentences of reviews of products, labelled as the movie reviews, from the same package."""
    load_movie_reviews()  # downloads it where it is not yet
    with tarfile.open(cached_archive()) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        lines = inner.extractfile(PRODUCTS).read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    columns = {"text": [text for _, _, text in rows], "label": [int(float(score) > 0) for _, score, _ in rows]}
    return Dataset.from_dict(columns).shuffle(seed=SPLIT_SEED).select(range(count))


def movie_sentences(seed: int, train_samples: int, wrong: float = 0.0, held_out: int | None = None) -> Prepared:
    """Prepare MiniLM with a fresh head for the movie reviews, on a choice of the training examples.

    With `held_out`, there are so many validation and test examples, and as many sentences from elsewhere.
    """
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    splits = load_movie_reviews()
    train = splits["train"].shuffle(seed=seed).select(range(train_samples))
    columns = {"text": train["text"][:], "label": with_wrong_labels(train["label"][:], wrong, 2, seed)}
    splits["train"] = Dataset.from_dict(columns, features=train.features)
    if held_out is not None:
        splits |= {name: splits[name].select(range(held_out)) for name in ("validation", "test")}
        splits["elsewhere"] = product_reviews(held_out)

    def encode(batch: dict) -> dict:
        return {**tokenizer(batch["text"], truncation=True, max_length=40), "labels": batch["label"]}

    splits = splits.map(encode, batched=True, remove_columns=["text", "label"])
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), dtype="float32", num_labels=2)
    settings = {"processing_class": tokenizer, "compute_metrics": accuracy_and_f1}
    return Prepared(model, splits, settings, wrong_validation(splits, wrong, 2, seed))


def descriptions() -> Dataset:
    """Return what scikit-learn's documentation says of each of its data sets: prose that language models know well."""
    files = sorted(Path(sklearn.datasets.__file__).parent.glob("descr/*.rst"))
    return Dataset.from_dict({"text": [file.read_text(encoding="utf-8") for file in files]})


def movie_text(seed: int, lora: bool = True) -> Prepared:
    """Prepare SmolLM2, with LoRA or all of its weights, for sentences of movie reviews; `elsewhere` is documentation.

    The sentences are joined and cut into pieces of 64 tokens. Training makes the model used to pieces that begin
    anywhere, whatever they are about. So each text of `elsewhere` is read from its beginning, 256 tokens of it.
    """
    recipe = causal_lm.CausalArguments(use_peft=lora, lora_r=8, lora_alpha=16, packing=True, max_length=64)
    model, tokenizer = load_model(recipe)
    splits = movie_prompts().shuffle(seed=SPLIT_SEED)
    sizes = {"train": 256, "validation": 64, "test": 128}
    splits = DatasetDict({name: splits[name].select(range(size)) for name, size in sizes.items()})
    encode = partial(encode_language, tokenizer=tokenizer, columns=(recipe.text_column,))
    # Texts stay whole: packing cuts them.
    columns = splits["train"].column_names
    splits = splits.map(encode, batched=True, fn_kwargs={"max_length": None}, remove_columns=columns)
    splits = splits.map(causal_lm.pack, batched=True, fn_kwargs={"length": recipe.max_length})
    known = descriptions()
    splits["elsewhere"] = known.map(
        encode, batched=True, fn_kwargs={"max_length": 256}, remove_columns=known.column_names
    )
    set_seed(seed)
    settings = {
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "compute_metrics": causal_lm.perplexity_and_accuracy,
        "preprocess_logits_for_metrics": causal_lm.token_losses,
    }
    return Prepared(get_peft_model(model, lora_config(recipe)) if lora else model, splits, settings)


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


def wrong_validation(splits: Splits, wrong: float, classes: int, seed: int) -> list[int]:
    """Return the validation labels, of which `wrong` are changed: others than the training labels' draw changes."""
    labels = [example["labels"] for example in splits["validation"]]
    return with_wrong_labels(labels, wrong, classes, seed + 1_000_000)


def digits_vit(seed: int, wrong: float = 0.0) -> Prepared:
    """Prepare the small ViT, from scratch, for the digits."""
    set_seed(seed)
    model, processor = small_vit(num_labels=10)

    def encode(images: list) -> torch.Tensor:
        return processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    splits = digit_splits(encode, wrong, seed)
    return Prepared(model, splits, {"compute_metrics": accuracy}, wrong_validation(splits, wrong, 10, seed))


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


def digits_cnn(seed: int, wrong: float) -> Prepared:
    """Prepare the CNN, from scratch, for the digits, with a share of the training labels wrong."""
    set_seed(seed)

    def encode(images: list) -> torch.Tensor:
        return torch.tensor(np.stack([np.asarray(image) for image in images])).float().unsqueeze(1) / 255

    splits = digit_splits(encode, wrong, seed)
    return Prepared(SmallCNN(), splits, {"compute_metrics": accuracy}, wrong_validation(splits, wrong, 10, seed))

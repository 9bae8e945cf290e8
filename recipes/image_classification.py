"""Finetune an image classifier (ViT, DeiT, Swin, ConvNeXt, ResNet, ...) by the stock Trainer, SAM or X-SAM.

    python recipes/image_classification.py recipes/configs/digits.yaml --optimizer_mode sam
    accelerate launch recipes/image_classification.py --dataset_name ethz/food101 --model_name_or_path ...

Without a model and data set of yours: a small ViT from scratch on scikit-learn's handwritten digits.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from arguments import SPLITS, RecipeArguments
from closing import card_facts
from common import make_trainer, run, train_and_report
from datasets import DatasetDict
from loading import labelled, limited, load_classifier, load_splits, named_model
from parsing import parse_arguments
from problems import METRICS, LabelArguments, head
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hf_xsam import XSAMConfig
from hf_xsam.data.checks import InputError, require_columns, with_rows
from hf_xsam.data.columns import ImageColumns
from hf_xsam.data.digits import digits

logger = logging.getLogger(__name__)


@dataclass
class ImageArguments(LabelArguments, ImageColumns, RecipeArguments):
    """The model, the data, where the images are, and how they are varied."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with one folder of images a class, to train on."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Such a folder to evaluate on."})
    test_dir: str | None = field(default=None, metadata={"help": "Such a folder for the final test."})
    augmentation: Literal["none", "crop", "crop_and_flip"] = field(
        default="crop_and_flip",
        metadata={"help": "Random changes of training images, where torchvision is installed."},
    )

    def files(self) -> dict[str, str]:
        """Return the local files and folders, by their options."""
        folders = {option: path for split in SPLITS if (path := getattr(self, option := f"{split}_dir"))}
        for option in folders:
            if getattr(self, other := option.replace("_dir", "_file")):
                raise InputError(f"{option} and {other} are both set: name one of them.")
        return super().files() | folders


def small_vit(**labels: Any) -> tuple[ViTForImageClassification, ViTImageProcessor]:
    """Return a ViT of 4 small layers for 8 x 8 images, with fresh weights, and its image processor."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(image_size=8, patch_size=2, hidden_dropout_prob=0.1, **sizes, **labels)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return ViTForImageClassification(config), processor


def augment(kind: str, processor: Any) -> Callable[[Any], Any]:
    """Return a function that changes an image at random, or leaves it where torchvision is not installed."""
    if kind == "none":
        return lambda image: image
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError):  # the latter from one that does not fit the torch installed
        logger.warning("augmentation is %r, but torchvision cannot be imported: training goes on without.", kind)
        return lambda image: image
    size = processor.size
    height = size.get("height") or size["shortest_edge"]
    steps = [v2.RandomResizedCrop((height, size.get("width") or height), scale=(0.5, 1.0), antialias=True)]
    return v2.Compose(steps + [v2.RandomHorizontalFlip()] * (kind == "crop_and_flip"))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of images classified right."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments((ImageArguments, TrainingArguments, XSAMConfig), argv)
    args.remove_unused_columns = False  # the image column is not the model's, but becomes its pixels on the way
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        splits = load_splits(recipe, digits, folders=True)
    for name, split in splits.items():
        require_columns(split, recipe.source(name), image_column=recipe.image_column)
    labels, splits = labelled(splits, recipe, recipe.label_column, recipe.problem_type)
    splits = limited(DatasetDict({name: with_rows(split) for name, split in splits.items()}), recipe)
    for name, split in splits.items():
        encode = recipe.image_encoder(split, recipe.source(name))

    if recipe.model_name_or_path:
        with named_model(recipe.model_name_or_path):
            processor = AutoImageProcessor.from_pretrained(recipe.model_name_or_path)
        model = load_classifier(AutoModelForImageClassification, recipe.model_name_or_path, **head(labels))
    else:
        model, processor = small_vit(**head(labels))

    for name, split in splits.items():
        change = augment(recipe.augmentation if name == "train" else "none", processor)
        split.set_transform(partial(encode, processor=processor, change=change))

    trainer = make_trainer(
        recipe,
        xsam,
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        compute_metrics=METRICS.get(labels.problem, accuracy),
    )
    # Some of these models' losses are normalized over the whole accumulated batch, some are means over each batch
    # whatever their `forward(**kwargs)` says. The mean, which all of them can give, is right for all.
    trainer.model_accepts_loss_kwargs = False
    data = "digits (scikit-learn)"
    card = card_facts(recipe, "image-classification", None, data)
    return train_and_report(trainer, recipe, xsam, splits, data, **card)


if __name__ == "__main__":
    run(main)

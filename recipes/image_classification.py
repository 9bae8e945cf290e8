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
from common import (
    RecipeArguments,
    card_facts,
    limited,
    load_splits,
    make_trainer,
    parse_arguments,
    train_and_report,
    without_hidden_labels,
)
from datasets import load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hf_xsam import XSAMConfig
from hf_xsam.data.columns import ImageColumns
from hf_xsam.data.digits import digits
from hf_xsam.data.splits import label_names

logger = logging.getLogger(__name__)


@dataclass
class ImageArguments(ImageColumns, RecipeArguments):
    """The model, the data, where the images are, and how they are varied."""

    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images a class."})
    augmentation: Literal["none", "crop", "crop_and_flip"] = field(
        default="crop_and_flip",
        metadata={"help": "Random changes of training images, where torchvision is installed."},
    )


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
    recipe, args, xsam = parse_arguments(HfArgumentParser((ImageArguments, TrainingArguments, XSAMConfig)), argv)
    args.remove_unused_columns = False  # the image column is not the model's, but becomes its pixels on the way
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        embedded = (lambda: load_dataset("imagefolder", data_dir=recipe.train_dir)) if recipe.train_dir else digits
        splits = load_splits(recipe, embedded)
    names, number_of = label_names(splits["train"], recipe.label_column)
    encode = recipe.image_encoder(splits["train"], number_of)
    splits = limited(without_hidden_labels(splits, recipe.label_column, number_of), recipe)

    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if recipe.model_name_or_path:
        processor = AutoImageProcessor.from_pretrained(recipe.model_name_or_path)
        model = AutoModelForImageClassification.from_pretrained(
            recipe.model_name_or_path, dtype="float32", ignore_mismatched_sizes=True, **labels
        )
    else:
        model, processor = small_vit(**labels)

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
        compute_metrics=accuracy,
    )
    # Some of these models' losses are normalized over the whole accumulated batch, some are means over each batch
    # whatever their `forward(**kwargs)` says. The mean, which all of them can give, is right for all.
    trainer.model_accepts_loss_kwargs = False
    data = recipe.train_dir or "digits (scikit-learn)"
    card = card_facts(recipe, "image-classification", None, data)
    return train_and_report(trainer, recipe, xsam, splits, data, **card)


if __name__ == "__main__":
    main()

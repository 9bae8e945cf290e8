"""The data of a recipe: load its splits, read its labels, and limit it; and say what is wrong with a model's name."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arguments import SPLITS, RecipeArguments
from datasets import DatasetDict
from safetensors import SafetensorError

from hf_xsam.data.checks import InputError, one_line
from hf_xsam.data.files import load_file, load_hub
from hf_xsam.data.labels import (
    Labels,
    Problem,
    lacks_labels,
    natural_problem,
    read_labels,
    refuse_unlikely_classes,
    require_different_labels,
    with_targets,
)
from hf_xsam.data.splits import chosen, with_validation

logger = logging.getLogger(__name__)


def load_splits(recipe: RecipeArguments, embedded: Callable[[], DatasetDict], folders: bool = False) -> DatasetDict:
    """Load the data set named, the local files, or the embedded data, in the order of their rows.

    Args:
        recipe: names the data.
        embedded: loads the recipe's own.
        folders: whether a folder of images will do for a file.

    Raises:
        InputError: for data that cannot be loaded, or without a training split.
    """
    if recipe.dataset_name:
        splits = load_hub(recipe.dataset_name, recipe.dataset_config_name, "dataset_name")
    elif files := recipe.files():
        splits = DatasetDict()
        for option, path in files.items():  # each by itself: they may be of several kinds
            split, found = option.partition("_")[0], load_file(path, option, folders)
            splits |= found if split == "train" else {split: found["train"]}
    else:
        splits = embedded()
    splits = DatasetDict({name: splits[name] for name in SPLITS if name in splits})
    if "train" not in splits:
        raise InputError(f"{recipe.dataset_name!r} has no split 'train'.")
    return splits


def labelled(
    splits: DatasetDict, recipe: RecipeArguments, column: str, problem: Problem | None = None
) -> tuple[Labels, DatasetDict]:
    """Return what the training data's labels mean, and the splits with what the model is trained on.

    A test split of the hub without any label is left out: benchmarks keep their labels to themselves.

    Raises:
        InputError: for labels that are missing, unknown, or all the same; it names the row.
    """
    train, where = splits["train"], recipe.source("train")
    if problem is None:
        problem = natural_problem(train, column, where)
        if problem == "single_label_classification":
            refuse_unlikely_classes(train, column, where)
    labels = read_labels(train, column, where, problem)
    if recipe.dataset_name and "test" in splits and lacks_labels(splits["test"], column):
        logger.warning("The test split is left out: it has no labels.")
        splits = DatasetDict({name: split for name, split in splits.items() if name != "test"})
    targets = {}
    for name, split in splits.items():  # training data first
        targets[name] = with_targets(split, labels, recipe.source(name))
        if name == "train":
            require_different_labels(targets[name], labels, where)
    return labels, DatasetDict(targets)


def limited(splits: DatasetDict, recipe: RecipeArguments) -> DatasetDict:
    """Return a validation split in any case, and of each `max_train_samples` or `max_eval_samples` random examples."""
    limits = {name: recipe.max_train_samples if name == "train" else recipe.max_eval_samples for name in splits}
    limits.setdefault("validation", recipe.max_eval_samples)
    return DatasetDict({name: chosen(split, limits[name]) for name, split in with_validation(splits).items()})


def encoded(splits: DatasetDict, encode: Callable[..., dict[str, list]], **options: Any) -> DatasetDict:
    """Return what `encode`, with `options`, makes of the splits, whose other columns may differ."""
    return DatasetDict(
        {
            name: split.map(encode, fn_kwargs=options, batched=True, remove_columns=split.column_names)
            for name, split in splits.items()
        }
    )


@contextmanager
def named_model(name: str) -> Iterator[None]:
    """Say of what fails while a model is loaded that it is `model_name_or_path`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        kind = "" if Path(name).exists() else ", neither a folder nor a model that can be loaded from the hub"
        raise InputError(f"model_name_or_path is {name!r}{kind}: {one_line(error)}") from error


def load_classifier(kind: Any, name: str, **head: Any) -> Any:
    """Return a pretrained model by the `Auto` class `kind`, in float32; one of other classes gets a new head."""
    with named_model(name):
        return kind.from_pretrained(name, dtype="float32", ignore_mismatched_sizes=True, **head)

"""Measure how sharp the minimum of a saved model is, print a table, and write it all to sharpness.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from .data.encoding import encode_images, encode_language, encode_texts
from .data.splits import FILE_KINDS, chosen, label_names, load_files, require_columns, with_validation
from .saved_model import SavedModel
from .sharpness import FILE_NAME, Sharpness, measure

DATA_OPTIONS = (
    "dataset",
    "dataset_config",
    "split",
    "text_column",
    "text_pair_column",
    "image_column",
    "label_column",
    "completion_only_loss",
    "prompt_column",
    "completion_column",
    "max_length",
    "batch_size",
)
EMBEDDED = ("movie_reviews", "digits", "movie_text")


@dataclass
class SharpnessArguments:
    """The model, the data, and what to measure."""

    model: str = field(metadata={"help": "Folder or hub name of a model, or of a PEFT adapter."})
    dataset: str = field(
        metadata={
            "help": "movie_reviews, digits or movie_text, which are embedded; a csv, json, jsonl or parquet file; or a "
            "data set on the hub."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the hub."})
    split: str = field(
        default="train",
        metadata={"help": "Split of the data set, as the recipes split it; a file is 'train' as a whole."},
    )
    samples: int = field(default=256, metadata={"help": "Measure on so many examples, chosen once for all runs."})
    batch_size: int = field(default=32, metadata={"help": "Examples at a time; fewer take less memory."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text, if any."})
    image_column: str = field(default="image", metadata={"help": "Column of the image."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    completion_only_loss: bool = field(
        default=False, metadata={"help": "For a language model, the loss of completions, given prompts, not of texts."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompt."})
    completion_column: str = field(default="completion", metadata={"help": "Column of the completion."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    top_k: int = field(default=1, metadata={"help": "Eigenvalues of the Hessian to find."})
    trace_samples: int = field(default=8, metadata={"help": "Random vectors for its trace; 0 for no trace."})
    rhos: list[float] = field(default_factory=lambda: [0.01, 0.05], metadata={"help": "Radii of SAM's sharpness."})
    slice_radius: float = field(default=0.5, metadata={"help": "How far slices of the loss reach from the weights."})
    slice_points: int = field(default=21, metadata={"help": "Losses on each slice; 0 for no slices."})
    eigen_scope: str = field(
        default="trainable",
        metadata={"help": "Parameters to measure over: 'trainable', 'lora', 'norm', or a regular expression."},
    )
    hvp: Literal["auto", "exact", "finite_difference"] = field(
        default="auto", metadata={"help": "Hessian-vector products by double backward, finite difference, or either."}
    )
    tolerance: float = field(default=1e-3, metadata={"help": "Relative residual at which an eigenpair is found."})
    seed: int = field(default=0, metadata={"help": "Seed of the random vectors."})
    device: str = field(default="auto", metadata={"help": "'cpu', 'cuda', 'cuda:1', ...; 'auto' is a GPU if any."})
    progress: bool = field(default=True, metadata={"help": "Show a progress bar."})
    output_file: str | None = field(
        default=None,
        metadata={"help": f"Where to write; by default {FILE_NAME} in the model's folder, for a hub model made here."},
    )

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.slice_points < 0:
            raise ValueError(f"slice_points is {self.slice_points}; it must be at least 0.")


def run(arguments: SharpnessArguments) -> None:
    """Measure, print, and write.

    Raises:
        ValueError: for a model, data, column, split, device or setting that does not fit; the message says why.
        ArithmeticError: where the loss is not finite, or has no eigenpairs that can be found.
    """
    # A hub model's folder is one of its name, here.
    folder = Path(arguments.model if Path(arguments.model).is_dir() else Path(arguments.model).name)
    path = Path(arguments.output_file or folder / FILE_NAME)
    device = find_device(arguments.device)
    saved = SavedModel.find(arguments.model)
    torch.manual_seed(arguments.seed)
    prepare = {
        "text-classification": prepare_texts,
        "image-classification": prepare_images,
        "text-generation": prepare_language,
    }[saved.task]
    split = load_split(arguments)
    model, dataloader = prepare(saved, split, arguments)
    radius, points = arguments.slice_radius, arguments.slice_points
    sharpness = measure(
        model.to(device),
        dataloader,
        top_k=arguments.top_k,
        trace_samples=arguments.trace_samples,
        rhos=arguments.rhos,
        distances=np.linspace(-radius, radius, points).round(9).tolist(),
        eigen_scope=arguments.eigen_scope,
        hvp=arguments.hvp,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
        progress=arguments.progress,
    )
    sharpness.model = arguments.model
    data = {name: getattr(arguments, name) for name in DATA_OPTIONS}
    sharpness.settings = {**data, "samples": min(arguments.samples, len(split)), **sharpness.settings}
    print_table(sharpness)  # first: the figures are there though they cannot be written
    print(f"Written to {sharpness.save(path)}")


def load_split(arguments: SharpnessArguments) -> Dataset:
    """Return the split of the data set that the arguments name, whole."""
    name = arguments.dataset
    if name in EMBEDDED:
        splits = with_validation(embedded(name))
    elif Path(name).suffix in FILE_KINDS:
        if not Path(name).is_file():
            raise ValueError(f"dataset is {name!r}, and there is no such file.")
        splits = _loaded(name, lambda: load_files({"train": name}, "dataset"))
    else:
        found = _loaded(name, lambda: load_dataset(name, arguments.dataset_config))
        splits = DatasetDict({**found, **with_validation(found)})
    if arguments.split not in splits:
        raise ValueError(f"split is {arguments.split!r}; {name} has {', '.join(splits)}.")
    return splits[arguments.split]


def embedded(name: str) -> DatasetDict:
    """Return the splits of one of `EMBEDDED`."""
    if name == "digits":
        from .data.digits import digits

        return digits()
    from .data.movie_reviews import load_movie_reviews, movie_prompts

    return movie_prompts() if name == "movie_text" else load_movie_reviews()


def prepare_texts(saved: SavedModel, split: Dataset, arguments: SharpnessArguments) -> tuple[nn.Module, DataLoader]:
    """Return a text classifier, and batches of texts with their classes."""
    pair = {"text_pair_column": arguments.text_pair_column} if arguments.text_pair_column else {}
    require_columns(split, text_column=arguments.text_column, **pair)
    number_of = class_numbers(split, arguments.label_column, saved)
    tokenizer = load_tokenizer(saved)
    encode = partial(
        encode_texts,
        tokenizer=tokenizer,
        text_column=arguments.text_column,
        text_pair_column=arguments.text_pair_column,
        label_column=arguments.label_column,
        number_of=number_of,
        max_length=arguments.max_length,
    )
    sample = chosen(split, arguments.samples).map(encode, batched=True, remove_columns=split.column_names)
    # By the padding token, language models know where a text ends.
    model = load_classifier(saved, number_of, pad_token_id=tokenizer.pad_token_id)
    return model, DataLoader(sample, arguments.batch_size, collate_fn=DataCollatorWithPadding(tokenizer))


def prepare_images(saved: SavedModel, split: Dataset, arguments: SharpnessArguments) -> tuple[nn.Module, DataLoader]:
    """Return an image classifier, and batches of images with their classes."""
    require_columns(split, image_column=arguments.image_column)
    number_of = class_numbers(split, arguments.label_column, saved)
    encode = partial(
        encode_images,
        processor=_from_either(AutoImageProcessor, saved, "image processor"),
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        number_of=number_of,
    )
    sample = chosen(split, arguments.samples).with_transform(encode)
    dataloader = DataLoader(sample, arguments.batch_size, collate_fn=default_data_collator)
    return load_classifier(saved, number_of), dataloader


def prepare_language(saved: SavedModel, split: Dataset, arguments: SharpnessArguments) -> tuple[nn.Module, DataLoader]:
    """Return a causal language model, and batches of texts, or of completions of prompts."""
    options = ("prompt_column", "completion_column") if arguments.completion_only_loss else ("text_column",)
    columns = {option: getattr(arguments, option) for option in options}
    require_columns(split, **columns)
    tokenizer = load_tokenizer(saved)
    encode = partial(
        encode_language, tokenizer=tokenizer, columns=tuple(columns.values()), max_length=arguments.max_length
    )
    sample = chosen(split, arguments.samples).map(encode, batched=True, remove_columns=split.column_names)
    return saved.load(), DataLoader(sample, arguments.batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def class_numbers(split: Dataset, column: str, saved: SavedModel) -> dict[Any, int]:
    """Return the model's number of the class that each value of the label column is.

    Classes are matched by the model's names for them, else by their order, where there are as many as the model has.
    """
    names, number_of = label_names(split, column)
    if hidden := sorted(set(split.unique(column)) - number_of.keys()):
        raise ValueError(f"label_column {column!r} has {hidden}, which is no class: choose a split with labels.")
    label2id = saved.config.label2id or {}
    for spelled in (str, str.casefold):
        known = {spelled(name): int(number) for name, number in label2id.items()}
        if len(known) == len(label2id) and known.keys() >= set(map(spelled, names)):
            return {value: known[spelled(name)] for value, name in zip(number_of, names, strict=True)}
    # How many classes an adapter has shows when it is loaded.
    if saved.base is None and len(names) != saved.config.num_labels:
        raise ValueError(
            f"label_column {column!r} has {len(names)} classes, the model has {saved.config.num_labels}: measure it on "
            "data of the kind that it was trained on."
        )
    # LABEL_0 is what transformers calls a class without a name.
    if saved.base is None and not any(name.startswith("LABEL_") for name in label2id):
        in_order = sorted(label2id, key=label2id.__getitem__)
        by_order = ", ".join(f"{name} as {known}" for name, known in zip(names, in_order, strict=True))
        print(f"The model has other names for the classes of label_column {column!r}; it takes {by_order}.")
    return number_of


def load_classifier(saved: SavedModel, number_of: Mapping[Any, int], **settings: Any) -> nn.Module:
    """Return a classifier; an adapter's base model gets a head for the data's classes, which the adapter fills."""
    if saved.base is not None:
        settings |= {"num_labels": len(number_of), "ignore_mismatched_sizes": True}
    return saved.load(**settings)


def load_tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, which then can pad."""
    tokenizer = _from_either(AutoTokenizer, saved, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_device(name: str) -> torch.device:
    """Return the device that `name` names.

    Raises:
        ValueError: where there is no such device.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # the former from a torch without CUDA
        raise ValueError(f"device is {name!r}, which torch cannot use: {str(error).splitlines()[0]}") from error


def print_table(sharpness: Sharpness) -> None:
    """Print what was found."""
    settings = sharpness.settings
    table = Table("", "value", title=f"{sharpness.model} on {settings['samples']} of {settings['dataset']}")
    table.add_row("loss", f"{sharpness.loss:.4g}")
    table.add_row("norm of the gradient", f"{sharpness.gradient_norm:.4g}")
    pairs = zip(sharpness.eigenvalues, sharpness.gradient_angles_degrees, strict=True)
    for i, (value, angle) in enumerate(pairs, start=1):
        table.add_row(f"eigenvalue {i}", f"{value:.4g} ({angle:.1f} degrees from the gradient)")
    if sharpness.trace:
        table.add_row("trace", f"{sharpness.trace.mean:.4g} ± {sharpness.trace.standard_error:.2g}")
    for rho, rise in sharpness.sam_sharpness.items():
        table.add_row(f"SAM sharpness, rho {rho}", f"{rise:.4g}")
    Console(width=100).print(table)


def _loaded(name: str, load: Any) -> DatasetDict:
    try:
        return load()
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"dataset is {name!r}, which cannot be loaded ({str(error).splitlines()[0]}). It must be "
            f"{', '.join(EMBEDDED)}, a {', '.join(FILE_KINDS)} file, or a data set on the hub."
        ) from error


def _from_either(kind: Any, saved: SavedModel, what: str) -> Any:
    """Load a tokenizer or image processor from the model's folder, or else from its base model's."""
    reasons = []
    for name in (saved.name, saved.base) if saved.base else (saved.name,):
        try:
            return kind.from_pretrained(name)
        except (OSError, ValueError) as error:
            reasons.append(str(error).splitlines()[0])
    raise ValueError(
        f"{saved.name!r} has no {what} that loads ({'; '.join(reasons)}): save it into the same folder with "
        "save_pretrained."
    )

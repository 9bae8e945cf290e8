"""The data that a saved model's sharpness is measured on: what the options name, in the form that the model takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
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

from ..data.columns import ImageColumns, LanguageColumns, TextColumns
from ..data.splits import FILE_KINDS, chosen, label_names, load_files, with_validation
from ..step.refusals import first_line
from .saved_model import SavedModel

EMBEDDED = ("movie_reviews", "digits", "movie_text")


@dataclass(kw_only=True)
class DataArguments(TextColumns, ImageColumns, LanguageColumns):
    """The examples to measure on, and the columns that the model's task may read.

    Where the kinds of columns share an option, texts' default counts: `max_length` is 128.
    """

    dataset: str = field(
        metadata={
            "help": "movie_reviews, digits or movie_text, which need no hub; a csv, json, jsonl or parquet file; or a "
            "data set on the hub."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the hub."})
    split: str = field(
        default="train",
        metadata={"help": "Split of the data set, as in the recipes; the split of a file is 'train'."},
    )
    samples: int = field(
        default=256, metadata={"help": "Number of examples to measure on, the same ones for every run."}
    )
    batch_size: int = field(default=32, metadata={"help": "Examples per batch; smaller batches take less memory."})
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column of the text. For a language model also of a chat's messages: if there is no column 'text', "
            "'messages' is read."
        },
    )

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


def load_split(data: DataArguments) -> Dataset:
    """Return the whole split of the data set that the arguments name."""
    name = data.dataset
    if name in EMBEDDED:
        splits = with_validation(embedded(name))
    elif Path(name).suffix in FILE_KINDS:
        if not Path(name).is_file():
            raise ValueError(f"dataset is {name!r}, and there is no such file.")
        splits = _loaded(name, lambda: load_files({"train": name}, "dataset"))
    else:
        found = _loaded(name, lambda: load_dataset(name, data.dataset_config))
        splits = DatasetDict({**found, **with_validation(found)})
    if data.split not in splits:
        raise ValueError(f"split is {data.split!r}; {name} has {', '.join(splits)}.")
    return splits[data.split]


def embedded(name: str) -> DatasetDict:
    """Return the splits of one of `EMBEDDED`."""
    if name == "digits":
        from ..data.digits import digits

        return digits()
    from ..data.movie_reviews import load_movie_reviews, movie_prompts

    return movie_prompts() if name == "movie_text" else load_movie_reviews()


def prepare(saved: SavedModel, split: Dataset, data: DataArguments) -> tuple[nn.Module, DataLoader]:
    """Return the model, and batches of the split's examples in the form that it takes."""
    by_task = {
        "text-classification": prepare_texts,
        "image-classification": prepare_images,
        "text-generation": prepare_language,
    }
    return by_task[saved.task](saved, split, data)


def prepare_texts(saved: SavedModel, split: Dataset, data: DataArguments) -> tuple[nn.Module, DataLoader]:
    """Return a text classifier, and batches of texts with their classes."""
    number_of = class_numbers(split, data.label_column, saved)
    encode = data.text_encoder(split, number_of)
    tokenizer = load_tokenizer(saved)
    sample = tokenized(chosen(split, data.samples), encode, tokenizer)
    model = load_classifier(saved, number_of)
    # Language models find the end of a text by the padding token.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, DataLoader(sample, data.batch_size, collate_fn=DataCollatorWithPadding(tokenizer))


def prepare_images(saved: SavedModel, split: Dataset, data: DataArguments) -> tuple[nn.Module, DataLoader]:
    """Return an image classifier, and batches of images with their classes."""
    number_of = class_numbers(split, data.label_column, saved)
    encode = data.image_encoder(split, number_of)
    processor = _from_either(AutoImageProcessor, saved, "image processor")
    sample = chosen(split, data.samples).with_transform(partial(encode, processor=processor))
    dataloader = DataLoader(sample, data.batch_size, collate_fn=default_data_collator)
    return load_classifier(saved, number_of), dataloader


def prepare_language(saved: SavedModel, split: Dataset, data: DataArguments) -> tuple[nn.Module, DataLoader]:
    """Return a causal language model, and batches of texts or chats, or of completions of prompts."""
    encode = data.language_encoder(split)
    tokenizer = load_tokenizer(saved)
    sample = tokenized(chosen(split, data.samples), encode, tokenizer)
    return saved.load(), DataLoader(sample, data.batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def tokenized(sample: Dataset, encode: Callable[..., dict[str, list]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the examples as tokens, which `encode` makes of them."""
    return sample.map(encode, fn_kwargs={"tokenizer": tokenizer}, batched=True, remove_columns=sample.column_names)


def class_numbers(split: Dataset, column: str, saved: SavedModel) -> dict[Any, int]:
    """Return the model's class number for each value of the label column.

    Classes are matched by their names, or by their order if the model has other names for as many classes.
    """
    names, number_of = label_names(split, column)
    if hidden := sorted(set(split.unique(column)) - number_of.keys()):
        raise ValueError(f"label_column {column!r} has {hidden}, which is not a class: choose a split with labels.")
    label2id = saved.config.label2id or {}
    for spelled in (str, str.casefold):
        known = {spelled(name): int(number) for name, number in label2id.items()}
        if len(known) == len(label2id) and known.keys() >= set(map(spelled, names)):
            return {value: known[spelled(name)] for value, name in zip(number_of, names, strict=True)}
    # The number of an adapter's classes is known only once it is loaded.
    if saved.base is None and len(names) != saved.config.num_labels:
        raise ValueError(
            f"label_column {column!r} has {len(names)} classes, and the model has {saved.config.num_labels}: measure "
            "it on the kind of data that it was trained on."
        )
    # LABEL_0 is what transformers calls a class without a name.
    if saved.base is None and not any(name.startswith("LABEL_") for name in label2id):
        in_order = sorted(label2id, key=label2id.__getitem__)
        by_order = ", ".join(f"{name} as {known}" for name, known in zip(names, in_order, strict=True))
        print(
            f"The model's classes have other names than those of label_column {column!r}; they are matched in order: "
            f"{by_order}."
        )
    return number_of


def load_classifier(saved: SavedModel, number_of: Mapping[Any, int]) -> Any:
    """Return a classifier; an adapter's base model gets a head for the data's classes, which the adapter fills."""
    if saved.base is None:
        return saved.load()
    return saved.load(num_labels=len(number_of), ignore_mismatched_sizes=True)


def load_tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, which then can pad."""
    tokenizer = _from_either(AutoTokenizer, saved, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _loaded(name: str, load: Any) -> DatasetDict:
    try:
        return load()
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"dataset is {name!r}, which cannot be loaded ({first_line(error)}). It must be "
            f"{', '.join(EMBEDDED)}, a {', '.join(FILE_KINDS)} file, or a data set on the hub."
        ) from error


def _from_either(kind: Any, saved: SavedModel, what: str) -> Any:
    """Load a tokenizer or image processor from the model's folder, or else from its base model's."""
    reasons = []
    for name in (saved.name, saved.base) if saved.base else (saved.name,):
        try:
            return kind.from_pretrained(name)
        except (OSError, ValueError) as error:
            reasons.append(first_line(error))
    raise ValueError(
        f"{saved.name!r} has no {what} that can be loaded ({'; '.join(reasons)}): save one into the same folder with "
        "save_pretrained."
    )

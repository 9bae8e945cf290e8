"""The data that a saved model's sharpness is measured on: what the options name, in the form that the model takes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
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

from ..data.checks import InputError, require_columns, with_rows
from ..data.columns import ImageColumns, LanguageColumns, TextColumns
from ..data.files import FILE_KINDS, load_file, load_hub
from ..data.labels import Labels, Problem, natural_problem, read_labels, with_targets
from ..data.splits import chosen, with_validation
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
    elif Path(name).suffix.lower() in FILE_KINDS:
        splits = load_file(name, "dataset")
    else:
        instead = f"It must be {', '.join(EMBEDDED)}, a {', '.join(FILE_KINDS)} file, or a data set on the hub."
        found = load_hub(name, data.dataset_config, "dataset", instead)
        splits = DatasetDict({**found, **with_validation(found)})
    if data.split not in splits:
        raise InputError(f"split is {data.split!r}; {name} has {', '.join(splits)}.")
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
    """Return a model of texts' classes or of a number, and batches of texts with their labels."""
    labels = labels_for(saved, split, data)
    encode = data.text_encoder(split, data.dataset)
    tokenizer = load_tokenizer(saved)
    sample = tokenized(chosen(with_targets(split, labels, data.dataset), data.samples), encode, tokenizer)
    model = load_classifier(saved, labels)
    # Language models find the end of a text by the padding token.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, DataLoader(sample, data.batch_size, collate_fn=DataCollatorWithPadding(tokenizer))


def prepare_images(saved: SavedModel, split: Dataset, data: DataArguments) -> tuple[nn.Module, DataLoader]:
    """Return an image classifier, and batches of images with their classes."""
    labels = labels_for(saved, split, data)
    require_columns(split, data.dataset, image_column=data.image_column)
    rows = chosen(with_rows(with_targets(split, labels, data.dataset)), data.samples)
    encode = data.image_encoder(rows, data.dataset)
    processor = _from_either(AutoImageProcessor, saved, "image processor")
    sample = rows.with_transform(partial(encode, processor=processor))
    return load_classifier(saved, labels), DataLoader(sample, data.batch_size, collate_fn=default_data_collator)


def prepare_language(saved: SavedModel, split: Dataset, data: DataArguments) -> tuple[nn.Module, DataLoader]:
    """Return a causal language model, and batches of texts or chats, or of completions of prompts."""
    encode = data.language_encoder(split, data.dataset)
    tokenizer = load_tokenizer(saved)
    sample = tokenized(chosen(split, data.samples), encode, tokenizer)
    return saved.load(), DataLoader(sample, data.batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def tokenized(sample: Dataset, encode: Callable[..., dict[str, list]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the examples as tokens, which `encode` makes of them."""
    return sample.map(encode, fn_kwargs={"tokenizer": tokenizer}, batched=True, remove_columns=sample.column_names)


def labels_for(saved: SavedModel, split: Dataset, data: DataArguments) -> Labels:
    """Return what the label column means for the model: its classes, one or several a row, or a number.

    Classes are matched by their names, or by their order if the model has other names for as many classes.
    """
    column = data.label_column
    found = read_labels(split, column, data.dataset, problem_of(saved, split, data))
    if found.problem == "regression":
        return found
    label2id = saved.config.label2id or {}
    for spelled in (str, str.casefold):
        known = {spelled(name): int(number) for name, number in label2id.items()}
        ours = {spelled(name): name for name in found.names}
        if len(known) == len(label2id) and len(ours) == len(found.names) and known.keys() >= ours.keys():
            return replace(found, names=[ours.get(name, name) for name in sorted(known, key=known.__getitem__)])
    # The number of an adapter's classes is known only once it is loaded.
    if saved.base is None and len(found.names) != saved.config.num_labels:
        raise InputError(
            f"label_column {column!r} has {len(found.names)} classes, and the model has {saved.config.num_labels}: "
            "measure it on the kind of data that it was trained on."
        )
    # LABEL_0 is what transformers calls a class without a name.
    if saved.base is None and not any(name.startswith("LABEL_") for name in label2id):
        in_order = sorted(label2id, key=label2id.__getitem__)
        by_order = ", ".join(f"{name} as {known}" for name, known in zip(found.names, in_order, strict=True))
        print(
            f"The model's classes have other names than those of label_column {column!r}; they are matched in order: "
            f"{by_order}."
        )
    return found


def problem_of(saved: SavedModel, split: Dataset, data: DataArguments) -> Problem:
    """Return what the model was trained for, or for an adapter what the label column's type says."""
    if saved.config.problem_type:
        return saved.config.problem_type
    if saved.base is not None:
        return natural_problem(split, data.label_column, data.dataset)
    return "regression" if saved.config.num_labels == 1 else "single_label_classification"


def load_classifier(saved: SavedModel, labels: Labels) -> Any:
    """Return a classifier; an adapter's base model gets a head for the data's labels, which the adapter fills."""
    if saved.base is None:
        return saved.load()
    settings = {"num_labels": len(labels.names) or 1, "problem_type": labels.problem}
    return saved.load(**settings, ignore_mismatched_sizes=True)


def load_tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, which then can pad."""
    tokenizer = _from_either(AutoTokenizer, saved, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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

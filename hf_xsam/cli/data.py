"""What a saved model's sharpness is measured on: the data that the command's options name, as the model takes it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from ..data.encoding import encode_images, encode_language, encode_texts
from ..data.splits import FILE_KINDS, chosen, label_names, load_files, require_columns, with_validation
from ..step.refusals import first_line
from .saved_model import SavedModel

if TYPE_CHECKING:
    from .sharpness import SharpnessArguments

EMBEDDED = ("movie_reviews", "digits", "movie_text")


def load_split(arguments: "SharpnessArguments") -> Dataset:
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
        from ..data.digits import digits

        return digits()
    from ..data.movie_reviews import load_movie_reviews, movie_prompts

    return movie_prompts() if name == "movie_text" else load_movie_reviews()


def prepare(saved: SavedModel, split: Dataset, arguments: "SharpnessArguments") -> tuple[nn.Module, DataLoader]:
    """Return the model, and batches of the split's examples as it takes them."""
    by_task = {
        "text-classification": prepare_texts,
        "image-classification": prepare_images,
        "text-generation": prepare_language,
    }
    return by_task[saved.task](saved, split, arguments)


def prepare_texts(saved: SavedModel, split: Dataset, arguments: "SharpnessArguments") -> tuple[nn.Module, DataLoader]:
    """Return a text classifier, and batches of texts with their classes."""
    require_columns(split, text_column=arguments.text_column, text_pair_column=arguments.text_pair_column or None)
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
    model = load_classifier(saved, number_of)
    # By the padding token, language models know where a text ends.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, DataLoader(sample, arguments.batch_size, collate_fn=DataCollatorWithPadding(tokenizer))


def prepare_images(saved: SavedModel, split: Dataset, arguments: "SharpnessArguments") -> tuple[nn.Module, DataLoader]:
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


def prepare_language(
    saved: SavedModel, split: Dataset, arguments: "SharpnessArguments"
) -> tuple[nn.Module, DataLoader]:
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
        f"{saved.name!r} has no {what} that loads ({'; '.join(reasons)}): save it into the same folder with "
        "save_pretrained."
    )

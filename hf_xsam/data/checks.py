"""What is checked of data before it is encoded, so that a mistake is one line that names it."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Image, LargeList, List, Value
from PIL import Image as Pillow
from transformers import PreTrainedTokenizerBase

ROW = "row"  # the column of `with_rows`
LONGEST = 400  # characters of another library's message


class InputError(ValueError):
    """An option, a file or a row that does not fit. Its message is one line that names it and says what to do."""


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, cut if it is long, or the error's type where it has none."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."


def require_columns(split: Dataset, where: str = "the data", **columns: str | None) -> None:
    """Raise an InputError if a column is missing; `columns` maps options to column names, or to None for no column."""
    for option, column in columns.items():
        if column is not None and column not in split.column_names:
            raise InputError(f"{option} is {column!r}; {where} has {', '.join(split.column_names)}.")


def is_messages(value: Any) -> bool:
    """Return whether a value is a conversation: a list of messages, each with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def require_texts(split: Dataset, where: str, *columns: str, messages: bool = False) -> None:
    """Refuse a row that has no text in one of the columns.

    Args:
        split: the rows, in the order of their file.
        where: names the file, for the error.
        columns: names of columns.
        messages: whether a conversation will do too.

    Raises:
        InputError: it names the column, the value and the row.
    """
    for column in columns:
        for row, value in _suspects(split, column):
            if isinstance(value, str) or (messages and is_messages(value)):
                continue
            what = "messages with a role" if messages and isinstance(value, list) else "a text"
            numbers = (
                ", or save texts that are numbers as strings in a json file" if isinstance(value, int | float) else ""
            )
            raise InputError(
                f"Column {column!r} holds {shown(value)}, not {what}, in row {row} of {where}: correct or remove it, "
                f"and rows like it{numbers}."
            )


def require_images(split: Dataset, where: str, column: str) -> None:
    """Refuse a row whose image is missing or cannot be decoded.

    Args:
        split: rows with the column of `with_rows`.
        where: names the file or folder, for the error.
        column: name of the column of images.

    Raises:
        InputError: it names the image's file, or else the row.
    """
    if not isinstance(split.features[column], Image):
        raise InputError(
            f"Column {column!r} holds {shown(split[0][column])}, not an image, in row 1 of {where}: name a folder of "
            "images, or save the rows with a column of type datasets.Image()."
        )
    for row in split.select_columns([column, ROW]).cast_column(column, Image(decode=False)):
        source = row[column] or {}
        try:
            with Pillow.open(_opened(source)) as image:
                image.draft("RGB", (1, 1))  # a JPEG is then decoded at an eighth of its size
                image.load()
        except Exception as error:  # Pillow's decoders raise errors of many types
            file = f" ({source['path']})" if source.get("path") else ""
            raise InputError(
                f"Column {column!r} holds no image that can be read in row {row[ROW]} of {where}{file}: "
                f"{one_line(error)}. Correct or remove it."
            ) from error


def with_rows(split: Dataset) -> Dataset:
    """Return the split with a column of the rows' numbers, from 1, which stay theirs when rows are shuffled."""
    others = split.remove_columns(ROW) if ROW in split.column_names else split
    return others.add_column(ROW, list(range(1, len(split) + 1)))


def require_end_of_text(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise an InputError if a language model's tokenizer has no end-of-sequence token; `name` is the model's."""
    if tokenizer.eos_token is None:
        raise InputError(
            f"The tokenizer of {name!r} has no end-of-sequence token, with which texts end: set tokenizer.eos_token "
            "and save it with save_pretrained."
        )


def shown(value: Any) -> str:
    """Return what to show of a value in an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _suspects(split: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows, numbered from 1, that may hold no text or messages: few where the column's type says enough."""
    feature = split.features[column]
    if not isinstance(feature, List | LargeList) and feature not in (Value("string"), Value("large_string")):
        yield from enumerate(split[column], start=1)
        return
    values = split.select_columns(column).with_format("arrow")[:][column]
    if isinstance(feature, List | LargeList):
        missing = pc.fill_null(pc.equal(pc.list_value_length(values), 0), True)
        yield 1, split[0][column]
    else:
        missing = values.is_null()
    if (first := pc.index(missing, True).as_py()) >= 0:
        yield first + 1, split[first][column]


def _opened(source: dict[str, Any]) -> Any:
    if source.get("bytes"):
        return BytesIO(source["bytes"])
    if not source.get("path"):
        raise ValueError("there is none")
    return source["path"]

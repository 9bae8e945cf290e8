"""Load data sets from local files, folders of images and the hub; what is wrong with them is said in one line."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import DatasetDict, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import logging

from .checks import InputError, one_line

FILE_KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
FOLDER = "imagefolder"
# Only an empty cell has no value: NA, None and null are texts and labels like any other.
CSV_OPTIONS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
# pyarrow's words for a value that has another type than the rows before it.
OTHER_TYPE = re.compile(r"Failed to parse string: '(?P<text>.*)' as|Float value (?P<float>\S+) was truncated")
ROW_FROM_0 = re.compile(r"\.? in row \d+$")  # pyarrow's, of JSON
# pandas' words, which count lines from 0.
UNCLOSED = re.compile(r"Error tokenizing data. C error: EOF inside string starting at row (\d+)")


def load_file(path: str, option: str, folders: bool = False) -> DatasetDict:
    """Load a csv, tsv, json, jsonl or parquet file as the split `train`, or a folder of images with its splits.

    Args:
        path: of the file or folder.
        option: the option that set the path, for the error.
        folders: whether a folder, with one folder of images a class, will do.

    Raises:
        InputError: for a file that is missing, of another kind, empty or damaged; it names file and line if it can.
    """
    named = f"{option} is {path!r}"
    file = Path(path)
    kind = FOLDER if folders and file.is_dir() else FILE_KINDS.get(file.suffix.lower())
    if file.is_dir() and kind != FOLDER:
        raise InputError(f"{named}, which is a folder; name a file that ends in {', '.join(FILE_KINDS)}.")
    if kind is None:
        folder = ", or be a folder of images" if folders else ""
        raise InputError(f"{named}; it must end in {', '.join(FILE_KINDS)}{folder}.")
    if not file.exists():
        raise InputError(f"{named}, and there is no such file.")
    if file.is_file() and not file.stat().st_size:
        raise InputError(f"{named}, which is empty.")
    options: dict[str, Any] = CSV_OPTIONS if kind == "csv" else {}
    if file.suffix.lower() == ".tsv":
        options = options | {"sep": "\t"}
    if kind == FOLDER and not any(file.rglob("metadata.*")):
        options = {"drop_labels": False}  # or else a folder with one class would have no labels
    where = {"data_dir": path} if kind == FOLDER else {"data_files": {"train": path}}
    with _quiet():
        try:
            splits = load_dataset(kind, **where, **options)
        except Exception as error:  # the readers' errors are of many types
            raise InputError(f"{named}, which {_what_is_wrong(file, kind, error)}") from error
    if empty := [name for name, split in splits.items() if not len(split)]:
        raise InputError(f"{named}, which has no rows in {', '.join(empty)}.")
    return splits


def load_hub(name: str, configuration: str | None, option: str, instead: str = "") -> DatasetDict:
    """Load a data set from the hub, or from a folder that is laid out like one.

    Args:
        name: its name or folder.
        configuration: which one, if it has several.
        option: the option that set the name, for the error.
        instead: what else the option may be, for the error.

    Raises:
        InputError: if it cannot be loaded.
    """
    try:
        return load_dataset(name, configuration)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        reason = one_line(error.__cause__ or error)
        raise InputError(f"{option} is {name!r}, which cannot be loaded ({reason}). {instead}".rstrip()) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the readers from showing a bar and from logging the error that is raised anyway."""
    before, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            enable_progress_bars()


def _what_is_wrong(file: Path, kind: str, error: Exception) -> str:
    """Return how the sentence "the file ..." goes on, with the line if it can be found."""
    if "corresponds to no data" in str(error) or isinstance(error, StopIteration):  # as datasets says it
        return "has a header and no rows." if kind == "csv" else "has no rows."
    if kind == FOLDER:
        return f"cannot be read as a folder with one folder of images a class: {one_line(error)}"
    if kind in LINES and (undecoded := _line_that_is_not_utf8(file)):
        return f"is not UTF-8 in line {undecoded}: save it in that encoding."
    reason = UNCLOSED.sub(_unclosed_quote, one_line(error.__cause__ or error))
    line = LINES[kind](file, reason) if kind in LINES else None
    if line is None:
        return f"cannot be read: {reason}"
    return f"cannot be read in line {line}: {ROW_FROM_0.sub('', reason)}"


def _unclosed_quote(found: re.Match[str]) -> str:
    return f"the quote that opens in line {int(found[1]) + 1} does not close"


def _line_that_is_not_utf8(file: Path) -> int | None:
    with file.open("rb") as lines:
        return next((number for number, line in enumerate(lines, start=1) if not _is_utf8(line)), None)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _broken_json_line(file: Path, reason: str) -> int | None:
    """Return the first line that is no JSON, or that the reader stopped at in a file that is one JSON value."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        json.loads(text)
        return None
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            return error.lineno
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            json.loads(line or "null")
        except json.JSONDecodeError:
            return number
    return None


def _csv_line_of_other_type(file: Path, reason: str) -> int | None:
    """Return the first line with the value whose type the reader complained about."""
    found = OTHER_TYPE.search(reason)
    if found is None:
        return None  # the reader's message has the line already
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        next(rows)
        for row in rows:
            if any(_is_value(cell, found) for cell in row):
                return rows.line_num
    return None


def _is_value(cell: str, found: re.Match[str]) -> bool:
    if found["text"] is not None:
        return cell == found["text"]
    try:
        return float(cell) == float(found["float"])
    except ValueError:
        return False


LINES: dict[str, Callable[[Path, str], int | None]] = {"json": _broken_json_line, "csv": _csv_line_of_other_type}

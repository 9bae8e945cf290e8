"""Data sets by name or from files, their splits, and their labels."""

from collections.abc import Mapping
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

SPLIT_SEED = 0  # apart from the run's seed, so that every run holds out the same examples
FILE_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_files(files: Mapping[str, str], option: str) -> DatasetDict:
    """Return the splits that local csv, json or parquet files hold.

    Args:
        files: one a split, all of the first one's kind.
        option: which names the first one, for the error.

    Raises:
        ValueError: for a file of another kind.
    """
    first = next(iter(files.values()))
    kind = FILE_KINDS.get(Path(first).suffix)
    if kind is None:
        raise ValueError(f"{option} is {first!r}; it must end in {', '.join(FILE_KINDS)}.")
    return load_dataset(kind, data_files=dict(files))


def with_validation(splits: DatasetDict) -> DatasetDict:
    """Return the splits train, validation and test, as far as there are any; validation is 10% of train if need be."""
    if "validation" not in splits and "train" in splits:
        halves = splits["train"].train_test_split(test_size=0.1, seed=SPLIT_SEED)
        splits = DatasetDict({**splits, "train": halves["train"], "validation": halves["test"]})
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def chosen(split: Dataset, limit: int | None) -> Dataset:
    """Return a random choice of `limit` examples, the same every time, or all where there are no more or it is None."""
    count = len(split) if limit is None else min(limit, len(split))
    return split.shuffle(seed=SPLIT_SEED).select(range(count))


def require_columns(split: Dataset, **columns: str | None) -> None:
    """Raise a ValueError where the data lacks a column; `columns` maps options to their values, None for no column."""
    for option, column in columns.items():
        if column is not None and column not in split.column_names:
            raise ValueError(f"{option} is {column!r}; the data has {', '.join(split.column_names)}.")


def label_names(split: Dataset, column: str) -> tuple[list[str], dict]:
    """Return the classes' names, and the number of each value of the label column."""
    require_columns(split, label_column=column)
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names, {number: number for number in range(feature.num_classes)}
    values = split.unique(column)
    if None in values:
        raise ValueError(f"label_column {column!r} has rows without a label: leave them out.")
    values = sorted(values)
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}

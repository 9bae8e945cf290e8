"""Load data from files, split it, and read its labels."""

from collections.abc import Mapping
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

SPLIT_SEED = 0  # not the run's seed, so that every run holds out the same examples
FILE_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_files(files: Mapping[str, str], option: str) -> DatasetDict:
    """Load local csv, json or parquet files as the splits of a data set.

    Args:
        files: the path of each split's file, all of the same kind.
        option: the option that set the first path, for the error.

    Raises:
        ValueError: if the first file is of another kind.
    """
    first = next(iter(files.values()))
    kind = FILE_KINDS.get(Path(first).suffix)
    if kind is None:
        raise ValueError(f"{option} is {first!r}; it must end in {', '.join(FILE_KINDS)}.")
    return load_dataset(kind, data_files=dict(files))


def with_validation(splits: DatasetDict) -> DatasetDict:
    """Return the splits train, validation and test that exist; without validation, take 10% of train for it."""
    if "validation" not in splits and "train" in splits:
        halves = splits["train"].train_test_split(test_size=0.1, seed=SPLIT_SEED)
        splits = DatasetDict({**splits, "train": halves["train"], "validation": halves["test"]})
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def chosen(split: Dataset, limit: int | None) -> Dataset:
    """Return `limit` random examples, the same every time; all of them if `limit` is None or larger than the split."""
    count = len(split) if limit is None else min(limit, len(split))
    return split.shuffle(seed=SPLIT_SEED).select(range(count))


def require_columns(split: Dataset, **columns: str | None) -> None:
    """Raise a ValueError if a column is missing; `columns` maps options to column names, or to None for no column."""
    for option, column in columns.items():
        if column is not None and column not in split.column_names:
            raise ValueError(f"{option} is {column!r}; the data has {', '.join(split.column_names)}.")


def label_names(split: Dataset, column: str) -> tuple[list[str], dict]:
    """Return the names of the classes, and a mapping from each value of the label column to its class number."""
    require_columns(split, label_column=column)
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names, {number: number for number in range(feature.num_classes)}
    values = split.unique(column)
    if None in values:
        raise ValueError(f"label_column {column!r} has rows without a label: remove them.")
    values = sorted(values)
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}

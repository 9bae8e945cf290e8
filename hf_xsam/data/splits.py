"""Split data, the same way every time."""

from datasets import Dataset, DatasetDict

from .checks import InputError

SPLIT_SEED = 0  # not the run's seed, so that every run holds out the same examples


def with_validation(splits: DatasetDict) -> DatasetDict:
    """Return the splits train, validation and test that exist; without validation, take 10% of train for it.

    Raises:
        InputError: if there are too few training examples for that.
    """
    if "validation" not in splits and "train" in splits:
        if len(splits["train"]) < 2:
            raise InputError("The training data has one row, and none for validation: add rows, or a validation file.")
        halves = splits["train"].train_test_split(test_size=0.1, seed=SPLIT_SEED)
        splits = DatasetDict({**splits, "train": halves["train"], "validation": halves["test"]})
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def chosen(split: Dataset, limit: int | None) -> Dataset:
    """Return `limit` random examples, the same every time; all of them if `limit` is None or larger than the split."""
    count = len(split) if limit is None else min(limit, len(split))
    return split.shuffle(seed=SPLIT_SEED).select(range(count))

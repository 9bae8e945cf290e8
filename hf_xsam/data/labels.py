"""Labels: whether a column has classes, sets of classes or numbers, and what the model is trained on in each case."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import ClassLabel, Dataset, LargeList, List

from . import TARGETS
from .checks import InputError, require_columns, shown

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
MEANT = {
    "single_label_classification": "a class",
    "multi_label_classification": "a list of classes",
    "regression": "a number",
}
SEPARATORS = (";", ",")  # of several labels in one text: the first that occurs


@dataclass(frozen=True)
class Labels:
    """What the values of a label column mean.

    Attributes:
        column: its name.
        problem: what transformers' configurations call `problem_type`.
        names: the classes' names in the order of their numbers; empty for regression.
        source: where they come from, for errors.
    """

    column: str
    problem: Problem
    names: Sequence[str] = ()
    source: str = "the training data"
    number_of: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number_of", {name: number for number, name in enumerate(self.names)})

    def target(self, value: Any) -> int | float | list[float]:
        """Return a value's class number, its classes as ones among zeros, or the number that it is.

        Raises:
            KeyError: for a class that is not among `names`.
            TypeError, ValueError: for what is no number, no class, or no list of classes.
        """
        if self.problem == "regression":
            return float(value)
        if self.problem == "single_label_classification":
            if isinstance(value, list | dict):
                raise ValueError("not a class")
            return self.number_of[class_name(value)]
        if not isinstance(value, list) or any(isinstance(each, list | dict) for each in value):
            raise ValueError("not a list of classes")
        target = [0.0] * len(self.names)
        for each in value:
            target[self.number_of[class_name(each)]] = 1.0
        return target


def class_name(value: Any) -> str:
    """Return the name of the class that a value is: of 1 and 1.0 the same."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def natural_problem(split: Dataset, column: str, where: str) -> Problem:
    """Return what a label column is for by its type: floats are numbers to predict, lists are sets of classes.

    Raises:
        InputError: if the column is missing.
    """
    require_columns(split, where, label_column=column)
    values = [value for value in label_values(split, column) if value is not None]
    if any(isinstance(value, list) for value in values):
        return "multi_label_classification"
    # A reader makes floats of a column of integers in which some are missing.
    if values and all(isinstance(value, float) for value in values):
        return "regression"
    return "single_label_classification"


def read_labels(split: Dataset, column: str, where: str, problem: Problem) -> Labels:
    """Return what a label column means, with the classes in the order of their type, or else sorted.

    Args:
        split: the data, in the order of its file.
        column: name of the label column.
        where: names the file, for errors.
        problem: what the labels are.

    Raises:
        InputError: for a column that is missing, and a row without a label.
    """
    require_columns(split, where, label_column=column)
    values = label_values(split, column, problem)
    _refuse_missing(values, f"label_column {column!r}", where)
    return Labels(column, problem, _names(split, column, values, problem), where)


def refuse_unlikely_classes(split: Dataset, column: str, where: str) -> None:
    """Raise an InputError for what is hardly meant as classes: numbers with texts among them, and mostly single values.

    Its message says which option has them taken for classes all the same.
    """
    named, values = f"label_column {column!r}", label_values(split, column)
    ask = "if they are classes, pass --problem_type single_label_classification"
    texts = [(row, value) for row, value in enumerate(values, start=1) if isinstance(value, str | float)]
    numbers = [value for _, value in texts if _is_fraction(value)]
    if numbers:
        for row, value in texts:
            if _number(value) is None:
                raise InputError(
                    f"{named} holds {value!r} in row {row} of {where}, among numbers such as {numbers[0]}: correct it; "
                    f"{ask}."
                )
        raise InputError(
            f"{named} holds numbers as texts in {where}, such as {numbers[0]!r}: pass --problem_type regression; {ask}."
        )
    different = len({value for value in values if isinstance(value, str | int)})
    if different > 20 and different > len(values) / 2:
        raise InputError(
            f"{named} holds {different} different values in {len(values)} rows of {where}: name another column, or for "
            f"numbers to predict pass --problem_type regression; {ask}."
        )


def require_different_labels(split: Dataset, labels: Labels, where: str) -> None:
    """Raise an InputError if all rows of a split with targets have the same."""
    targets = split[TARGETS][:]
    if all(target == targets[0] for target in targets):
        raise InputError(
            f"label_column {labels.column!r} holds one value alone in all {len(targets)} rows of {where}"
            f"{f' ({labels.names[0]})' if len(labels.names) == 1 else ''}: there is nothing to learn. Add rows with "
            "other labels, or name another column."
        )


def label_values(split: Dataset, column: str, problem: Problem | None = None) -> list[Any]:
    """Return a column's values as rows give them: of numbered classes the names, and None where there is no label.

    For several classes in a row, texts are split at semicolons or commas.
    """
    feature, values = split.features[column], split[column][:]
    if isinstance(feature, ClassLabel):
        return [_name(feature, value) for value in values]
    if isinstance(feature, List | LargeList) and isinstance(feature.feature, ClassLabel):
        return [value and [_name(feature.feature, each) for each in value] for value in values]
    if problem == "multi_label_classification" and not any(isinstance(value, list) for value in values):
        separator = next((mark for mark in SEPARATORS if any(mark in str(value) for value in values)), SEPARATORS[0])
        return [_split(value, separator) for value in values]
    return values


def lacks_labels(split: Dataset, column: str) -> bool:
    """Return whether no row of a split has a label, which the hub's benchmarks write as -1, for numbers too."""
    return column not in split.column_names or all(value in (None, -1) for value in label_values(split, column))


def with_targets(split: Dataset, labels: Labels, where: str) -> Dataset:
    """Return the split with what the model is trained on as a column `labels`, in place of the label column.

    Raises:
        InputError: for a label that is missing or that `labels` does not know; it names file and row.
    """
    require_columns(split, where, label_column=labels.column)
    values = label_values(split, labels.column, labels.problem)
    _refuse_missing(values, f"label_column {labels.column!r}", where)
    targets = targets_of(values, labels, where)
    return split.remove_columns([*{labels.column, TARGETS} & {*split.column_names}]).add_column(TARGETS, targets)


def targets_of(values: Iterable[Any], labels: Labels, where: str) -> list[Any]:
    """Return the targets of a column's values; the errors of `Labels.target` become ones that name the row."""
    targets = []
    for row, value in enumerate(values, start=1):
        try:
            target = labels.target(value)
        except KeyError as error:
            known = ", ".join(labels.names[:10]) + (", ..." if len(labels.names) > 10 else "")
            raise InputError(
                f"label_column {labels.column!r} holds {error.args[0]!r} in row {row} of {where}, which is no class of "
                f"{labels.source} ({known}): correct the label or remove the row."
            ) from error
        except (TypeError, ValueError) as error:
            raise InputError(
                f"label_column {labels.column!r} holds {shown(value)} in row {row} of {where}, not "
                f"{MEANT[labels.problem]}: correct the label, or name another problem_type than {labels.problem!r}."
            ) from error
        if isinstance(target, float) and not math.isfinite(target):
            raise InputError(
                f"label_column {labels.column!r} holds {value!r} in row {row} of {where}, not a finite number: correct "
                "the label or remove the row."
            )
        targets.append(target)
    return targets


def _names(split: Dataset, column: str, values: Sequence[Any], problem: Problem) -> list[str]:
    if problem == "regression":
        return []
    feature = split.features[column]
    inner = feature if problem == "single_label_classification" else getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    classes = values if problem == "single_label_classification" else [each for value in values for each in value]
    numbers = {value for value in classes if isinstance(value, int | float)}
    others = {str(value) for value in classes if not isinstance(value, int | float | list | dict)}
    return list(dict.fromkeys([*map(class_name, sorted(numbers)), *sorted(others)]))


def _refuse_missing(values: Sequence[Any], named: str, where: str) -> None:
    for row, value in enumerate(values, start=1):
        if value is None or (isinstance(value, list) and None in value):
            raise InputError(f"{named} has no label in row {row} of {where}: add it or remove the row.")


def _number(value: Any) -> float | None:
    """Return the finite number that a value is or spells, if any."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_fraction(value: Any) -> bool:
    number = _number(value)
    return number is not None and not number.is_integer()


def _name(feature: ClassLabel, number: int | None) -> str | None:
    return feature.names[number] if number is not None and 0 <= number < feature.num_classes else None


def _split(value: Any, separator: str) -> list[str]:
    return [part.strip() for part in str(value).split(separator) if part.strip()] if value is not None else []

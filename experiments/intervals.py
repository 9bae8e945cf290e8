"""Paired differences between two modes, with intervals, and Holm's correction for a table of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats


class Difference(NamedTuple):
    """The mean over seeds of one mode's value minus another's, its 95% confidence interval, and the t test's p."""

    n: int
    mean: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """Return which side of zero the interval lies on."""
        if self.n < 2:
            return "too few seeds"
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "within noise"

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        return f"{self.mean:+.3g}" + (f" [{self.low:+.3g}, {self.high:+.3g}]" if self.n > 1 else "")


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Return the difference between two modes, paired by the seeds that both have.

    mean(d) -+ t(0.975, n - 1) * s(d) / sqrt(n), d the n differences and s their standard deviation.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    n = len(differences)
    if n < 2:
        return Difference(n, differences[0] if n else math.nan, math.nan, math.nan, math.nan)
    average, deviation = mean_and_deviation(differences)
    average = round(average, 12)  # a sum of rounding errors is none
    error = deviation / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(average) / error, n - 1)) if error else float(average == 0)
    return Difference(n, average, average - half, average + half, p)


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation of the sample (n - 1), nan for a single value."""
    values = list(values)
    average = sum(values) / len(values)
    if len(values) < 2:
        return average, math.nan
    return average, math.sqrt(sum((value - average) ** 2 for value in values) / (len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (Holm 1979), which hold for all of the comparisons together.

    The k-th smallest of m, counted from 0, is multiplied by m - k; none is below a smaller one's, or above 1. Those
    that are nan, of comparisons that cannot be made, stay so and do not count.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = list(p_values), 0.0
    for k, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - k) * p_values[i]))
        adjusted[i] = largest
    return adjusted

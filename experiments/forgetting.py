"""The tables of forgetting: how much worse a model gets at what it knew, at equal loss on the text that it learnt.

A run is a point: the loss on the new text, and the rise of the loss on documentation. A seed's points make a curve from
its smallest learning rate to its largest. A larger one whose loss is no lower than a smaller one's is no point of it:
nobody would choose it. Losses are logarithms of perplexities, in nats a token.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from gains import price
from intervals import Difference, holm, mean_and_deviation, paired_difference
from tables import MINUS, Runs, spread, table, values

Record = Mapping[str, Any]
Sweep = Mapping[tuple[float, int], Record]  # by learning rate and seed
NEW, KNOWN = "test", "elsewhere"


class Point(NamedTuple):
    """The loss on the new text after training, and by how much training raised the loss on documentation."""

    loss: float
    rise: float


def point_of(record: Record) -> Point | None:
    """Return the point of a run; None for one that diverged."""
    metrics = record["metrics"]
    new, known, before = (split["perplexity"] for split in (metrics[NEW], metrics[KNOWN], metrics["before"][KNOWN]))
    return None if new is None or known is None else Point(math.log(new), math.log(known / before))


def curve(records: Sweep, seed: int) -> dict[float, Point]:
    """Return the points of a seed's curve by learning rate, in its order: their losses fall."""
    found: dict[float, Point] = {}
    for rate in sorted(rate for rate, each in records if each == seed):
        point = point_of(records[rate, seed])
        if point and all(point.loss < smaller.loss for smaller in found.values()):
            found[rate] = point
    return found


def beyond_stock(runs: Runs, mode: str) -> dict[tuple[float, int], float]:
    """Return by how much more a mode's runs raise the loss on documentation than the stock optimizer at the same loss.

    The stock optimizer's rise is read from the curve of the same seed, a straight line between two points. Runs whose
    loss is not within its losses, and runs that are no points of their own curve, are left out.

    Returns:
        Differences in nats a token, by learning rate and seed; negative where the mode forgets less.
    """
    found = {}
    for seed in sorted({seed for _, seed in runs[mode]}):
        stock = sorted(curve(runs.get("stock", {}), seed).values())
        for rate, point in curve(runs[mode], seed).items():
            if stock and stock[0].loss <= point.loss <= stock[-1].loss:
                found[rate, seed] = point.rise - float(np.interp(point.loss, *zip(*stock, strict=True)))
    return found


def by_seed(numbers: Mapping[tuple[float, int], float]) -> dict[int, float]:
    """Return the mean over the learning rates of each seed."""
    found: dict[int, list[float]] = {}
    for (_, seed), number in numbers.items():
        found.setdefault(seed, []).append(number)
    return {seed: mean_and_deviation(each)[0] for seed, each in found.items()}


def at(rate: float, numbers: Mapping[tuple[float, int], Any]) -> dict[int, Any]:
    """Return what belongs to a learning rate, by seed."""
    return {seed: number for (each, seed), number in numbers.items() if each == rate}


def from_zero(numbers: Mapping[int, float]) -> Difference:
    """Return the mean over seeds of numbers that are differences, with its interval."""
    return paired_difference(numbers, dict.fromkeys(numbers, 0.0))


def runs_table(runs: Runs) -> str:
    """Return the table of every mode at every learning rate."""
    head = ["mode", "learning rate, rho", "n", "perplexity, new text", "perplexity, documentation", "rise"]
    head += [f"rise {MINUS} `stock`'s at the same loss [95%]", "compared", "CPU s"]
    some = runs["stock"]
    before = [spread(values(some, "metrics", "before", split, "perplexity")) for split in (NEW, KNOWN)]
    rows = [["before training", "", "", *before, *[""] * 4]]
    for mode, records in runs.items():
        beyond = {} if mode == "stock" else beyond_stock(runs, mode)
        for rate in sorted({rate for rate, _ in records}):
            of_rate = at(rate, records)
            xsam = next(iter(of_rate.values()))["settings"]["xsam"]
            rises = {seed: point.rise for seed, record in of_rate.items() if (point := point_of(record))}
            rows.append(
                [
                    f"`{mode}`",
                    f"{rate:g}" + (f", {xsam['rho']:g}" if xsam else ""),
                    str(len(of_rate)),
                    *(spread(values(of_rate, "metrics", split, "perplexity")) for split in (NEW, KNOWN)),
                    spread(rises),
                    str(from_zero(at(rate, beyond))),
                    "-" if mode == "stock" else str(len(at(rate, beyond))),
                    spread(values(of_rate, "cost", "train_cpu_seconds")),
                ]
            )
    return table(head, rows)


def equal_loss_table(runs: Runs) -> str:
    """Return the table of what each mode forgets beyond the stock optimizer: a mean of each seed's learning rates."""
    found = {mode: beyond_stock(runs, mode) for mode in runs if mode != "stock"}
    differences = {mode: from_zero(by_seed(numbers)) for mode, numbers in found.items()}
    adjusted = holm([each.p for each in differences.values()])
    rows = [
        [
            f"`{mode}`",
            f"{price(runs, mode):.2f}",
            f"{len(found[mode])} of {len(runs[mode])}",
            str(difference.n),
            str(difference),
            "-" if math.isnan(p) else f"{p:.2g}",
            difference.verdict,
        ]
        for (mode, difference), p in zip(differences.items(), adjusted, strict=True)
    ]
    return table(["", "time", "runs compared", "seeds", "difference [95%]", "p (Holm)", "verdict"], rows)


def forgetting(runs: Runs) -> str:
    """Return both tables of a task."""
    return f"{runs_table(runs)}\n\n*At equal loss on the new text*\n\n{equal_loss_table(runs)}"

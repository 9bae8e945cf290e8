"""The tables of the first six tasks: short finetuning, and training on nearly clean data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from intervals import mean_and_deviation, paired_difference
from tables import EIGENVALUE, MINUS, Runs, has_all_seeds, metric_of, spread, table, values
from tasks import TASKS


class Claim(NamedTuple):
    """A statement that one mode's value differs from another's.

    Attributes:
        text: the statement.
        pairs: the two modes, ours first.
        eigenvalue: whether it is of the top eigenvalue; of the test metric if not.
    """

    text: str
    pairs: Sequence[tuple[str, str]]
    eigenvalue: bool


ALIGNED = ("aligned_0.5", "aligned_1", "aligned_2")
PAPER = ("paper", "paper_norm_kept")
CORRECTED = (*PAPER, "projection", *ALIGNED)
CLAIMS = [
    Claim(
        "X-SAM as in the paper lowers the top eigenvalue against SAM, at equal steps",
        [(mode, "sam") for mode in PAPER],
        True,
    ),
    Claim("X-SAM improves the test metric against SAM, at equal steps", [(mode, "sam") for mode in CORRECTED], False),
    Claim(
        "`aligned` lowers the top eigenvalue more than the paper's correction",
        [(mode, other) for mode in ALIGNED for other in PAPER],
        True,
    ),
    Claim(
        "X-SAM improves the test metric at equal cost, against the longer runs of SAM and the stock optimizer",
        [(mode, other) for mode in CORRECTED for other in ("sam_long", "stock_long")],
        False,
    ),
]


def claim_rows(claim: Claim, found: Mapping[tuple[str, str], Runs]) -> list[list[str]]:
    """Return a row for each task, settings and pair of modes that there are runs of."""
    rows = []
    for (task, part), runs in found.items():
        keys = ("metrics", EIGENVALUE) if claim.eigenvalue else metric_of(task)
        better = "lower" if claim.eigenvalue or not TASKS[task].greater_is_better else "higher"
        for ours, theirs in claim.pairs:
            if ours in runs and theirs in runs:
                difference = paired_difference(values(runs[ours], *keys), values(runs[theirs], *keys))
                verdict = difference.verdict
                holds = "yes" if verdict == better else "the opposite" if verdict in ("lower", "higher") else "open"
                label = f"{ours} {MINUS} {theirs}"
                rows.append([task, part, label, keys[-1], str(difference), str(difference.n), verdict, holds])
    return rows


TITLES = {
    "digits_cnn": "CNN, 10% wrong labels",
    "digits_vit": "small ViT",
    "movies_500": "MiniLM, 500 sentences",
    "movies_noise": "MiniLM, 800, 20% wrong labels",
    "movies": "MiniLM, 2,500",
    "movie_text_lora": "SmolLM2, LoRA: perplexity",
}
LABELS = {
    "stock": "stock Trainer",
    "sam": "SAM",
    "paper": "X-SAM, `paper`",
    "projection": "`projection`",
    "aligned_0.5": "`aligned`, alpha 0.5",
    "aligned_1": "`aligned`, alpha 1",
    "aligned_2": "`aligned`, alpha 2",
    "stock_long": "stock Trainer, in X-SAM's time",
    "sam_long": "SAM, in X-SAM's time",
}


FIRST_PAGE = ("stock", "sam", "paper", "stock_long", "sam_long")  # the rows of README.md's table


def complete(found: Mapping[tuple[str, str], Runs]) -> dict[str, Runs]:
    """Return the tuned runs of the first tasks that have five seeds of each mode of README.md's table."""
    return {
        task: runs
        for (task, part), runs in found.items()
        if part == "tuned" and task in TITLES and all(has_all_seeds(runs, mode) for mode in FIRST_PAGE)
    }


def overview(found: Mapping[tuple[str, str], Runs]) -> str:
    """Return the table of test metric and top eigenvalue of every mode; "-" without five seeds."""
    tasks = complete(found)

    def cell(task: str, runs: Runs, mode: str) -> str:
        if not has_all_seeds(runs, mode):
            return "-"
        return ", ".join(spread(values(runs[mode], *keys)) for keys in (metric_of(task), ("metrics", EIGENVALUE)))

    rows = [[label, *(cell(task, runs, mode) for task, runs in tasks.items())] for mode, label in LABELS.items()]
    return table(["", *(TITLES[task] for task in tasks)], rows)


def short(found: Mapping[tuple[str, str], Runs]) -> str:
    """Return the table of README.md: the mean test metric of a few modes, to three digits."""
    tasks = complete(found)

    def cell(task: str, records: Mapping[int, dict[str, Any]]) -> str:
        average, _ = mean_and_deviation(values(records, *metric_of(task)).values())
        return f"{average:#.3g}".removesuffix(".")

    rows = [[LABELS[mode], *(cell(task, runs[mode]) for task, runs in tasks.items())] for mode in FIRST_PAGE]
    return table(["", *(TITLES[task] for task in tasks)], rows)

"""The table that says in which situation SAM, one pass or X-SAM pays, by a rule, from the results alone.

A mode is named if it beats the best of the situation's baselines by Holm's correction over the row. Of several, the
cheapest is, unless a dearer one is better by a 95% interval. If none beats it, no gain was shown; if each is worse, the
table says not to use them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from forgetting import beyond_stock, by_seed
from gains import CLEAN, WRONG, Values, price, stopped_early
from intervals import Difference, holm, mean_and_deviation, paired_difference
from modes import LABELS
from tables import MINUS, SEEDS, Runs, has_all_seeds, metric_of, table, values
from tasks import TASKS

Reading = Callable[[str, Mapping[int, Any]], Values]
CANDIDATES = ("sam", "one_pass", "one_pass_differences", "one_pass_random", "paper")
NOT_MEASURED = "not measured yet"
# The tasks whose X-SAM had a v far from the top eigenvector; on digits the first estimate was as good as later ones.
LOST_EIGENVECTOR = ("movies_500", "movies_noise", "movies")
LEVEL = 0.05


def last(task: str, records: Mapping[int, Any]) -> Values:
    """Return the test metric after the last epoch."""
    return values(records, *metric_of(task))


def stopped(task: str, records: Mapping[int, Any], split: str) -> Values:
    """Return the test accuracy of the epoch that was best on `split`."""
    return stopped_early(records, split)


def damaged(task: str, records: Mapping[int, Any], kind: str) -> Values:
    """Return the test accuracy after damage."""
    return values(records, "metrics", "damage", kind, "accuracy")


class Situation(NamedTuple):
    """A situation, the task that stands for it, how its runs are read, and what has to be beaten."""

    text: str
    task: str | None
    read: Reading = last
    baselines: Sequence[tuple[str, Reading]] = (("stock", last), ("stock_long", last))


WITHOUT_CLEAN = (("stock", last), ("stock_long", last), ("stock", partial(stopped, split=WRONG)))
TITLES = {
    "digits_cnn_wrong40": "40% of the labels wrong, CNN from scratch",
    "digits_cnn_wrong60": "60% of the labels wrong, CNN from scratch",
    "digits_vit_wrong40": "40% of the labels wrong, small ViT from scratch",
    "movies_memorized": "30% of the labels wrong, MiniLM finetuned until it memorizes",
}


def wrong_labels(task: str, title: str) -> list[Situation]:
    """Return the situations that a task with wrong labels stands for."""
    on_wrong, on_clean, int4 = (
        partial(stopped, split=WRONG),
        partial(stopped, split=CLEAN),
        partial(damaged, kind="int4"),
    )
    stops = (*WITHOUT_CLEAN, ("stock_long", on_wrong))
    return [
        Situation(f"{title}; the last epoch is kept", task, last, WITHOUT_CLEAN),
        Situation(f"{title}; the best epoch on wrong validation labels is kept", task, on_wrong, stops),
        Situation(f"{title}; the best epoch on clean ones is kept", task, on_clean, both_by(on_clean)),
        Situation(f"{title}; the last epoch, rounded to 4 bits", task, int4, both_by(int4)),
    ]


def both_by(read: Reading) -> tuple[tuple[str, Reading], ...]:
    """Return the stock optimizer's two runs as baselines, read in one way."""
    return ("stock", read), ("stock_long", read)


SITUATIONS = [
    *(situation for task, title in TITLES.items() for situation in wrong_labels(task, title)),
    Situation("10% of the labels wrong, CNN from scratch", "digits_cnn"),
    Situation("20% of the labels wrong, MiniLM, a short finetuning", "movies_noise"),
    Situation("few clean examples (500 sentences), MiniLM", "movies_500"),
    Situation("clean examples (2,500 sentences), MiniLM, one epoch", "movies"),
    Situation("clean examples, small ViT from scratch, 20 epochs", "digits_vit"),
    Situation("LoRA of a language model, one epoch", "movie_text_lora"),
    Situation("long training on clean data, CNN from scratch, 100 epochs", "digits_cnn_long"),
    Situation("finetuning that must not forget what the model knew; LoRA", "movie_text_forgetting_lora"),
    Situation("finetuning that must not forget what the model knew; all weights", "movie_text_forgetting"),
    Situation("large models", None),
]


def measured(mode: str, task: str, runs: Runs) -> bool:
    """Return whether there are five seeds of the mode; X-SAM's do not count where v was another vector."""
    return has_all_seeds(runs, mode) and not (mode == "paper" and task in LOST_EIGENVECTOR)


def best_baseline(situation: Situation, task: str, runs: Runs) -> tuple[str, Values]:
    """Return the label and the numbers of the baseline with the best mean."""
    sign = 1 if TASKS[task].greater_is_better else -1
    found = []
    for mode, read in situation.baselines:
        numbers = read(task, runs[mode])
        split = read.keywords.get("split", "") if isinstance(read, partial) else ""
        label = f"`{mode}`" + {CLEAN: ", stopped on clean", WRONG: ", stopped on wrong"}.get(split, "")
        found.append((sign * mean_and_deviation(numbers.values())[0], label, numbers))
    _, label, numbers = max(found, key=lambda each: each[0])
    return label, numbers


def named(differences: Mapping[str, Difference], numbers: Mapping[str, Values], runs: Runs, sign: int) -> str:
    """Return the mode to use: see the module's rule."""
    adjusted = dict(zip(differences, holm([each.p for each in differences.values()]), strict=True))
    sure = {mode: sign * each.mean for mode, each in differences.items() if adjusted[mode] < LEVEL}
    better = [mode for mode, gain in sure.items() if gain > 0]
    choice = None
    for mode in sorted(better, key=partial(price, runs)):
        dearer_is_better = choice and paired_difference(numbers[mode], numbers[choice])
        wanted = "higher" if sign > 0 else "lower"
        if choice is None or dearer_is_better.verdict == wanted:
            choice = mode
    if choice:
        return f"**{LABELS[choice]}**"
    return "do not use it" if len(sure) == len(differences) else "no gain shown"


def cells_of(numbers: Mapping[str, Values], reference: Values, runs: Runs, sign: int) -> list[str]:
    """Return the cells of a row's modes, and of the mode to use."""
    differences = {mode: paired_difference(each, reference) for mode, each in numbers.items()}
    cells = [
        f"{differences[mode]}, {price(runs, mode):.1f}x" if mode in differences else NOT_MEASURED for mode in CANDIDATES
    ]
    return [*cells, named(differences, numbers, runs, sign)]


def tuned_row(situation: Situation, task: str, runs: Runs) -> list[str] | None:
    """Return the row of a situation that is read from tuned runs."""
    modes = [mode for mode in CANDIDATES if measured(mode, task, runs)]
    if not modes or not all(has_all_seeds(runs, mode) for mode, _ in situation.baselines):
        return None
    label, reference = best_baseline(situation, task, runs)
    numbers = {mode: situation.read(task, runs[mode]) for mode in modes}
    average, _ = mean_and_deviation(reference.values())
    baseline = f"{label}: {TASKS[task].metric} {average:.3g}"
    sign = 1 if TASKS[task].greater_is_better else -1
    return [situation.text, baseline, *cells_of(numbers, reference, runs, sign)]


def forgetting_row(situation: Situation, runs: Runs) -> list[str] | None:
    """Return the row of a situation in which less is to be forgotten than by the stock optimizer at the same loss."""
    found = {mode: by_seed(beyond_stock(runs, mode)) for mode in CANDIDATES if mode in runs}
    numbers = {mode: each for mode, each in found.items() if len(each) >= SEEDS}
    if not numbers:
        return None
    reference = {seed: 0.0 for each in numbers.values() for seed in each}
    baseline = "`stock` at the same loss on the new text: rise of the loss on documentation"
    return [situation.text, baseline, *cells_of(numbers, reference, runs, -1)]


def row_of(situation: Situation, found: Mapping[tuple[str, str], Runs]) -> list[str] | None:
    """Return the row of a situation; None where it, or what has to be beaten in it, was not measured."""
    task = situation.task
    if task is None:
        return None
    if TASKS[task].swept:
        return forgetting_row(situation, found.get((task, "sweep"), {}))
    return tuned_row(situation, task, found.get((task, "tuned"), {}))


def decisions(found: Mapping[tuple[str, str], Runs]) -> str:
    """Return the table of the situations that were measured, and the others as a list."""
    head = ["situation", "to be beaten", *(f"{LABELS[mode]} {MINUS} that" for mode in CANDIDATES), "use"]
    rows = {situation.text: row_of(situation, found) for situation in SITUATIONS}
    text = table(head, [row for row in rows.values() if row])
    missing = dict.fromkeys(name.partition(";")[0] for name, row in rows.items() if row is None)
    return text + "\n\nNot measured yet:\n\n" + "\n".join(f"- {name}" for name in missing) if missing else text

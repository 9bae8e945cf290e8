"""Write the tables of `experiments/README.md`, the short one of `README.md`, and the figures, from the results.

    python experiments/report.py

Every verdict follows from a 95% confidence interval of the paired difference over seeds; none is written by hand.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from claims import CLAIMS, claim_rows, overview, short
from decision import decisions
from figures import draw, draw_gains
from forgetting import forgetting
from gains import gains, short_gains
from pages import filled
from records import RESULTS, load
from tables import Runs, cost_rows, runs_of, summary, table, tuning_table
from tasks import TASKS

ROOT = Path(__file__).parent.parent
FIGURE, GAINS = "results.svg", "gains.svg"
Found = Mapping[tuple[str, str], Runs]  # by task and settings
PARTS = {"tuned": "each mode's own settings", "fixed": "the same settings for all"}


def load_all(results: Path) -> dict[tuple[str, str], Runs]:
    """Return the records of every task and settings that have any."""
    records = {task: load(task, results) for task in TASKS}
    return {
        (task, part): runs for task in TASKS for part in (*PARTS, "sweep") if (runs := runs_of(records[task], part))
    }


def first_tasks(found: Found) -> Found:
    """Return the runs of the first tasks, which have tables of their own."""
    return {(task, part): runs for (task, part), runs in found.items() if part in PARTS and not TASKS[task].watched}


def later_tasks(found: Found) -> dict[str, Runs]:
    """Return the tuned runs of the later tasks, those with wrong labels."""
    return {task: runs for (task, part), runs in found.items() if TASKS[task].watched and part == "tuned"}


def report(found: Found, results: Path) -> str:
    """Return all tables of the first tasks, with a link to the figure, and the cost of a step in all tasks."""
    first = first_tasks(found)
    if not first:
        return "There are no results yet."
    parts = ["### The claims"]
    head = ["task", "settings", "difference", "of", "mean [95% interval]", "n", "verdict", "claim holds"]
    for number, claim in enumerate(CLAIMS, 1):
        rows = claim_rows(claim, first)
        parts += [f"{number}. {claim.text}:", table(head, rows) if rows else "No runs of these modes yet."]
    parts.append(f"![Test metric and top eigenvalue of every run]({FIGURE})")
    for (task, part), runs in first.items():
        parts += [f"### {task}, {PARTS[part]}", summary(task, runs)]
    if rows := cost_rows(results):
        head = ["task", "mode", "CPU s a step", "relative", "forward and backward passes a step"]
        parts += ["### Cost of a step", table(head, rows)]
    return "\n\n".join(parts)


def wrong_labels(found: Found, results: Path) -> str:
    """Return all tables of the tasks with wrong labels."""
    texts = [
        f"### {task}\n\n*What tuning saw*\n\n{tuning_table(task, load(task, results))}\n\n{gains(task, runs)}"
        for task, runs in later_tasks(found).items()
    ]
    return "\n\n".join(texts) or "There are no results yet."


def sweeps(found: Found) -> str:
    """Return all tables of the tasks of forgetting."""
    texts = [
        f"### {task}\n\n{forgetting(runs)}"
        for (task, part), runs in found.items()
        if part == "sweep" and "stock" in runs  # which the others are compared with
    ]
    return "\n\n".join(texts) or "There are no results yet."


def first_page(found: Found) -> str:
    """Return the main README's table of the tasks with wrong labels, and the figure of gain and price."""
    text = short_gains(later_tasks(found))
    figure = f"![Gain in test accuracy over the stock Trainer, against training time](experiments/{GAINS})"
    return f"{text}\n\n{figure}" if text else "There are no results yet."


def pages(found: Found, results: Path, root: Path) -> dict[Path, str]:
    """Return the pages under `root` that have tables of the results, with these made anew."""
    tables = {
        root / "experiments" / "README.md": {
            "results": report(found, results),
            "overview": overview(found),
            "wrong_labels": wrong_labels(found, results),
            "forgetting": sweeps(found),
        },
        root / "README.md": {"experiments": short(found), "wrong_labels": first_page(found)},
        root / "docs" / "when-to-use.md": {"decisions": decisions(found)},
    }
    return {
        page: filled(page, {name: f"\n{text}\n" for name, text in of_page.items()}) for page, of_page in tables.items()
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the pages (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results, write the pages and the figures."""
    options = parse(argv)
    found = load_all(options.results)
    for page, text in pages(found, options.results, options.root).items():
        page.write_text(text, encoding="utf-8")
        print(f"Wrote {page}.")
    if first := first_tasks(found):
        draw(first, options.root / "experiments" / FIGURE)
    if later := {task: runs for task, runs in later_tasks(found).items() if "stock" in runs}:
        draw_gains(later, options.root / "experiments" / GAINS)


if __name__ == "__main__":
    main()

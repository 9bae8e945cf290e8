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
from figures import draw
from pages import filled
from records import RESULTS, load
from tables import Runs, cost_rows, runs_of, summary, table
from tasks import TASKS

ROOT = Path(__file__).parent.parent
FIGURE = "results.svg"
PARTS = {"tuned": "each mode's own settings", "fixed": "the same settings for all"}


def load_all(results: Path) -> dict[tuple[str, str], Runs]:
    """Return the records of every task and settings that have any."""
    records = {task: load(task, results) for task in TASKS}
    return {(task, part): runs for task in TASKS for part in PARTS if (runs := runs_of(records[task], part))}


def report(found: Mapping[tuple[str, str], Runs], results: Path) -> str:
    """Return all tables, with a link to the figure."""
    if not found:
        return "There are no results yet."
    parts = ["### The claims"]
    head = ["task", "settings", "difference", "of", "mean [95% interval]", "n", "verdict", "claim holds"]
    for number, claim in enumerate(CLAIMS, 1):
        rows = claim_rows(claim, found)
        parts += [f"{number}. {claim.text}:", table(head, rows) if rows else "No runs of these modes yet."]
    parts.append(f"![Test metric and top eigenvalue of every run]({FIGURE})")
    for (task, part), runs in found.items():
        parts += [f"### {task}, {PARTS[part]}", summary(task, runs)]
    if rows := cost_rows(results):
        head = ["task", "mode", "CPU s a step", "relative", "forward and backward passes a step"]
        parts += ["### Cost of a step", table(head, rows)]
    return "\n\n".join(parts)


def pages(found: Mapping[tuple[str, str], Runs], results: Path, root: Path) -> dict[Path, str]:
    """Return the pages under `root` that have tables of the results, with these made anew."""
    all_tables, first_page = root / "experiments" / "README.md", root / "README.md"
    tables = {"results": report(found, results), "overview": overview(found)}
    return {
        all_tables: filled(all_tables, {name: f"\n{text}\n" for name, text in tables.items()}),
        first_page: filled(first_page, {"experiments": f"\n{short(found)}\n"}),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the two pages (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results, write both pages and the figure."""
    options = parse(argv)
    found = load_all(options.results)
    for page, text in pages(found, options.results, options.root).items():
        page.write_text(text, encoding="utf-8")
        print(f"Wrote {page}.")
    if found:
        draw(found, options.root / "experiments" / FIGURE)


if __name__ == "__main__":
    main()

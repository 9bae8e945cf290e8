"""Tables that a benchmark writes into a page, between markers."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


def filled(path: Path, tables: Mapping[str, str]) -> str:
    """Return the page with what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` made anew.

    Raises:
        ValueError: where the page has not each pair of markers once.
    """
    page = path.read_text(encoding="utf-8")
    for name, text in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        page, count = re.subn(f"{begin}.*?{end}", lambda _, b=begin, e=end, t=text: f"{b}\n{t}\n{e}", page, flags=re.S)
        if count != 1:
            raise ValueError(
                f"{path.name} has the markers {begin!r} and {end!r} {count} times; it must have them once."
            )
    return page


def markdown(table: Table) -> str:
    """Return the table as a page has it."""
    table.box = box.MARKDOWN
    with Console(width=200, file=io.StringIO()) as console, console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip().splitlines())

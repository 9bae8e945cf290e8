"""Tables that a benchmark writes into a page, between markers."""

import re
from collections.abc import Mapping
from pathlib import Path


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

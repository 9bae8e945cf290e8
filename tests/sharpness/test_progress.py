"""What a measurement reports on the way, and the bar."""

import subprocess
import sys
import time
from itertools import pairwise

import pytest

from hf_xsam.sharpness import MeasureSettings, measure
from hf_xsam.sharpness.progress import bar
from tests.models import Smooth, points


def batches(count):
    columns = points(6 * count)
    return [{name: column[6 * i : 6 * i + 6] for name, column in columns.items()} for i in range(count)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("hvp", ["exact", "finite_difference", "auto"])
@pytest.mark.parametrize("change", [{}, {"trace_samples": 0, "slice_points": 0}, {"top_k": 3, "rhos": []}])
def test_each_batch_is_counted_once_and_the_total_is_reached(count, hvp, change):
    reports, model, seen = [], Smooth(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    settings = MeasureSettings(**{"slice_points": 3, "trace_samples": 4, "hvp": hvp, "tolerance": 0.01, **change})
    measure(model, batches(count), settings, progress=lambda *report: reports.append(report))
    parts, done, totals = zip(*reports, strict=True)
    slices = ["slices"] if settings.slice_points else []
    assert list(dict.fromkeys(parts)) == ["gradient", "eigenvalues", "trace", "sharpness", *slices]
    assert all(0 <= now - before <= count for before, now in pairwise(done))
    assert all(now <= total for now, total in zip(done, totals, strict=True))
    assert done[-1] == totals[-1]
    losses = 2 + len(settings.rhos) + 2 * settings.slice_points
    assert done[-1] >= count * (losses + settings.trace_samples + 2 * settings.top_k)
    # From when Lanczos is done, the total is known.
    assert (
        len({total for part, total in zip(parts, totals, strict=True) if part not in ("gradient", "eigenvalues")}) == 1
    )
    # The first total is of the products that it takes at least.
    assert totals[0] == count * (losses + settings.trace_samples + 3 * settings.top_k + 4)


def test_no_bar_where_stderr_is_no_terminal():
    code = "from hf_xsam.sharpness.progress import bar\nwith bar(True) as report: report('trace', 1, 2)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_on_a_terminal(shown, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with bar(shown) as report:
        time.sleep(0.2)  # within which it is not drawn again
        report("eigenvalues", 30, 120)
    said = capsys.readouterr().err
    assert ("eigenvalues" in said and "30/120" in said) is shown

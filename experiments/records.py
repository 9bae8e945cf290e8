"""The results: a file a task, a JSON line a run."""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def file_of(task: str, results: Path) -> Path:
    """Return the file that holds a task's results."""
    return results / f"{task}.jsonl"


def load(task: str, results: Path) -> dict[str, dict[str, Any]]:
    """Return a task's records by their run's key, such as "tuned/sam/0"; none where the task has no file."""
    path = file_of(task, results)
    if not path.is_file():
        return {}
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record["run"]: record for record in records}


def save(record: dict[str, Any], key: str, task: str, results: Path) -> None:
    """Add a run's record to its task's file, in place of an earlier one; numbers that are not finite become null.

    Processes take turns. A reader finds the file with the record or without it, never a part of it.
    """
    results.mkdir(parents=True, exist_ok=True)
    with _turn(results):
        records = load(task, results) | {key: {"run": key, **_finite(record)}}
        lines = [json.dumps(records[key], allow_nan=False) + "\n" for key in sorted(records)]
        partial = results / f"{task}.partial"
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(file_of(task, results))


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when its process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a step of SAM and of X-SAM costs on a GPU: time and peak memory, beside the stock Trainer's.

Run by `step_cost.py --device cuda`. Contenders run one after the other, for a GPU has no room for several.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from contenders import TrainerContender, trainers
from gpu_workloads import WORKLOADS
from pages import markdown
from rich.table import Table
from versions import setting
from workload import Workload

STOCK = "stock Trainer"
GIB = 2**30


def figures(make: Callable[..., TrainerContender], workload: Workload, steps: int, repeats: int) -> dict[str, Any]:
    """Return a contender's seconds a step, the mean over each block but the first, and its peak memory over all."""
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        contender = make(workload, folder, steps)
        blocks = [mean(contender.block()) for _ in range(repeats + 1)]
    weights = [p for p in contender.trainer.model.parameters() if p.requires_grad]
    return {
        "seconds": blocks[1:],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "trainable": sum(p.numel() for p in weights),
        "product": getattr(getattr(contender.trainer, "_xsam_steps", None), "method", None),
    }


def measure(workload: Workload, steps: int, repeats: int) -> dict[str, dict[str, Any] | None]:
    """Return the figures by contender: None for one that the GPU has too little memory for."""
    results: dict[str, dict[str, Any] | None] = {}
    for name, make in trainers(workload.rho).items():
        try:
            results[name] = figures(make, workload, steps, repeats)
        except torch.OutOfMemoryError:
            results[name] = None
        gc.collect()  # trainers hold themselves in circles
        torch.cuda.empty_cache()
        print(name, results[name], flush=True)
    return results


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Return all figures, a contender a line."""
    shown = Table("model", "contender", "step", "step / stock's", "step / SAM's", "peak memory", "peak / stock's")
    for name, workload in results.items():
        contenders = workload["contenders"]
        seconds = {contender: median(measured["seconds"]) for contender, measured in contenders.items() if measured}
        peaks = {contender: measured["peak_bytes"] for contender, measured in contenders.items() if measured}
        for contender in contenders:
            fits = contender in seconds
            shown.add_row(
                name,
                contender,
                f"{1000 * seconds[contender]:.1f} ms" if fits else "",
                over(seconds, contender, STOCK),
                over(seconds, contender, "SAM"),
                f"{peaks[contender] / GIB:.2f} GiB" if fits else "out of memory",
                over(peaks, contender, STOCK),
            )
    return shown


def over(values: Mapping[str, float], contender: str, reference: str) -> str:
    """Return how many times the reference's value a contender's is; nothing where either is not there."""
    return f"{values[contender] / values[reference]:.2f}" if {contender, reference} <= values.keys() else ""


def run(names: Sequence[str], steps: int, repeats: int, file: Path) -> None:
    """Measure the workloads, all without `names`, print the table, and write the figures to `file`.

    Workloads measured before keep their figures.

    Raises:
        SystemExit: without a CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--device is cuda, but torch.cuda.is_available() is False; leave it out to measure the CPU.")
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in names or WORKLOADS:
        measured = measure(WORKLOADS[name](), steps, repeats)
        results[name] = {"contenders": measured, "steps": steps, "setting": setting()}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(markdown(table({name: results[name]})), flush=True)
    print(markdown(table(results)))

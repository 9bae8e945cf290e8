"""What a step of SAM and X-SAM costs, as ratios to the stock Trainer's and to SAM's, and how good X-SAM's eigenvector is.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --workloads bert cnn --repeats 3

All are timed in one process and in turn, so that a ratio is of times that are minutes apart at most. Operations are
counted by torch's flop counter and do not depend on the machine; nor does the memory that tensors take.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from contenders import Contender, contenders
from eigenvector_quality import quality
from memory import peak_tensor_memory
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser
from versions import versions
from workloads import WORKLOADS, Workload

STOCK, SAM = "stock Trainer", "SAM"


@dataclass
class CostArguments:
    """What to measure, and where the figures go."""

    workloads: list[str] = field(default_factory=lambda: list(WORKLOADS), metadata={"help": "Of bert, vit, llama, cnn."})
    steps: int = field(default=20, metadata={"help": "Steps of a block: a multiple of every refresh interval."})
    repeats: int = field(default=5, metadata={"help": "Blocks of each that are timed."})
    output: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Folder for step_cost.json and .png."}
    )


def step_seconds(made: dict[str, Contender], repeats: int) -> list[dict[str, float]]:
    """Return for each repeat the mean seconds of a step of each contender, after one block that is not counted."""
    names = list(made)
    results = []
    for repeat in range(repeats + 1):
        order = names[repeat % len(names) :] + names[: repeat % len(names)]
        times = {name: mean(made[name].block()) for name in order}
        results.append({name: times[name] for name in names})
    return results[1:]


def flops(block: Callable[[], Any]) -> int:
    """Return the floating-point operations of matrix products, convolutions and attention in `block`."""
    with FlopCounterMode(display=False) as counter:
        block()
    return counter.get_total_flops()


def ratios(seconds: list[dict[str, float]], name: str, reference: str) -> dict[str, float]:
    """Return median, smallest and largest ratio of the two's step times within a repeat."""
    values = [times[name] / times[reference] for times in seconds]
    return {"median": median(values), "min": min(values), "max": max(values)}


def measure(workload: Workload, arguments: CostArguments, folder: str) -> dict[str, Any]:
    """Return the figures of one workload."""
    made = {name: make(workload, folder, arguments.steps) for name, make in contenders(workload.rho).items()}
    seconds = step_seconds(made, arguments.repeats)
    operations = {name: flops(contender.block) for name, contender in made.items()}
    peaks = {name: peak_tensor_memory(contender.block) for name, contender in made.items()}
    trainable = sum(
        p.numel() * p.element_size() for p in made[STOCK].trainer.model.parameters() if p.requires_grad
    )
    return {
        "trainable_bytes": trainable,
        "seconds": seconds,
        "contenders": {
            name: {
                "seconds": median(times[name] for times in seconds),
                "over_stock": ratios(seconds, name, STOCK),
                "over_sam": ratios(seconds, name, SAM),
                "forward_backward_equivalents": operations[name] / operations[STOCK],
                "peak_over_stock_bytes": peaks[name] - peaks[STOCK],
                "peak_over_stock_copies": (peaks[name] - peaks[STOCK]) / trainable,
            }
            for name in made
        },
    }

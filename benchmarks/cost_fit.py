"""Fits the cost model's few constants to what scaling.py measured, and says how far it is off elsewhere."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cost_formulas import Llama, Policy, ddp_traffic, launches, policies, step_flops, vectors
from scaling_sizes import LENGTH, MICRO_BATCH, SIZES
from scipy.optimize import nnls

from hf_xsam import XSAMConfig

RESULTS = Path(__file__).parent / "results" / "scaling.json"
MEASURED = XSAMConfig(eigen_interval=10, eigen_batch_fraction=0.5)  # the default settings when it was made
CONSTANTS = {
    "flop": ("one floating-point operation of a matrix product", "ps", 1e12),
    "vector": ("one number of a vector read or written", "ns", 1e9),
    "launch": ("the calls of one block's forward and backward pass", "ms", 1e3),
    "byte": ("one byte that a process sends in an all-reduce", "ns", 1e9),
}


@dataclass
class Sample:
    """One contender at one point: what a step takes by the formulas, and its processor seconds."""

    point: dict[str, Any]
    policy: Policy
    amounts: dict[str, float]
    seconds: float


def amounts(policy: Policy, model: Llama, micro_batches: int, processes: int) -> dict[str, float]:
    """Return how often a step of scaling.py pays each of the constants."""
    tokens = MICRO_BATCH * LENGTH * micro_batches
    return {
        "flop": step_flops(policy, model, tokens, LENGTH, micro_batches),
        "vector": vectors(policy, micro_batches) * model.trainable,
        "launch": launches(policy, model.layers, micro_batches),
        "byte": 2 * (processes - 1) / processes * ddp_traffic(policy, model.trainable)[1],
    }


def samples(points: list[dict[str, Any]]) -> list[Sample]:
    """Return each contender at each point."""
    names = {"AdamW": "stock Trainer", "SAM": "SAM", "X-SAM": "X-SAM"}
    return [
        Sample(
            point,
            policy,
            amounts(policy, SIZES[point["size"]], point["micro_batches"], point["processes"]),
            point["contenders"][names[policy.name]]["processor_seconds"],
        )
        for point in points
        for policy in policies(exact=True, xsam=MEASURED)
        if policy.name in names
    ]


def fit(fitted: list[Sample]) -> dict[str, float]:
    """Return seconds for each constant, at least 0, by least squares of the relative errors."""
    rows = [[sample.amounts[name] / sample.seconds for name in CONSTANTS] for sample in fitted]
    solution, _ = nnls(np.array(rows), np.ones(len(rows)))
    return dict(zip(CONSTANTS, solution.tolist(), strict=True))


def predicted(sample: Sample, constants: dict[str, float]) -> float:
    """Return the model's seconds: the sum of each amount times its constant."""
    return sum(sample.amounts[name] * constants[name] for name in CONSTANTS)


def held_out(point: dict[str, Any], size: str, processes: int) -> bool:
    """Return whether the fit leaves the point out: this size, alone, or as many processes."""
    return (point["size"] == size and point["processes"] == 1) or point["processes"] == processes


def points() -> list[dict[str, Any]]:
    """Return what scaling.py has measured."""
    return json.loads(RESULTS.read_text())["points"]


def measured() -> str:
    """Return the ratios that scaling.py measured, in Markdown."""
    heads = "parameters", "micro-batches", "processes", "SAM / AdamW", "X-SAM / AdamW", "X-SAM / SAM"
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | --- | --- | --- | --- |"]
    for point in points():
        cells = [f"{point['parameters']:,}", str(point["micro_batches"]), str(point["processes"])]
        for name, reference in (("SAM", "stock"), ("X-SAM", "stock"), ("X-SAM", "sam")):
            ratio = point["contenders"][name][f"processor_over_{reference}"]
            cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def breakdown() -> str:
    """Return what X-SAM adds to SAM's step by each constant, in percent of it, in Markdown; by a fit to all."""
    every = samples(points())
    constants = fit(every)
    lines = ["| parameters, micro-batches | flops | vectors | calls | together |", "| --- | --- | --- | --- | --- |"]
    for size, micro_batches in (("1M", 1), ("1M", 32), ("16M", 1), ("16M", 32), ("135M", 1), ("135M", 32)):
        sam, xsam = (amounts(policy, SIZES[size], micro_batches, 1) for policy in policies(exact=True)[1:3])
        whole = sum(sam[name] * constants[name] for name in CONSTANTS)
        parts = [(xsam[name] - sam[name]) * constants[name] / whole for name in ("flop", "vector", "launch")]
        cells = [f"{part:+.0%}" for part in [*parts, sum(parts)]]
        lines.append(f"| {SIZES[size].trainable:,}, {micro_batches} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(size: str = "16M", processes: int = 4) -> str:
    """Return two tables in Markdown: the constants, and measured against predicted where the fit has not looked."""
    all_samples = samples(points())
    constants = fit([sample for sample in all_samples if not held_out(sample.point, size, processes)])
    lines = ["| constant | fitted |", "| --- | --- |"]
    for name, (meaning, unit, factor) in CONSTANTS.items():
        lines.append(f"| {meaning} | {constants[name] * factor:.3g} {unit} |")
    lines += ["", "| not fitted: parameters, processes | AdamW | SAM | X-SAM | SAM / AdamW | X-SAM / SAM |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for point in {id(s.point): s.point for s in all_samples if held_out(s.point, size, processes)}.values():
        chosen = {s.policy.name: s for s in all_samples if s.point is point}
        model = {name: predicted(sample, constants) for name, sample in chosen.items()}
        real = {name: sample.seconds for name, sample in chosen.items()}
        cells = [f"{1000 * real[name]:.0f} ms, by the model {model[name] / real[name] - 1:+.0%}" for name in real]
        for above, below in (("SAM", "AdamW"), ("X-SAM", "SAM")):
            cells.append(f"{real[above] / real[below]:.2f}, by the model {model[above] / model[below]:.2f}")
        lines.append(f"| {point['parameters']:,}, {point['processes']} | " + " | ".join(cells) + " |")
    errors = [abs(predicted(s, constants) / s.seconds - 1) for s in all_samples]
    outside = [error for s, error in zip(all_samples, errors, strict=True) if held_out(s.point, size, processes)]
    inside = [error for s, error in zip(all_samples, errors, strict=True) if not held_out(s.point, size, processes)]
    lines += ["", f"Mean absolute error of a step's seconds: {np.mean(inside):.0%} over the {len(inside)} fitted, "]
    lines[-1] += f"{np.mean(outside):.0%} over the {len(outside)} that were not."
    return "\n".join(lines)

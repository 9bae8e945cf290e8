"""What SAM and X-SAM cost, as ratios to the stock Trainer's and to SAM's steps, as model, batch and processes grow.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --axes parameters --sizes 4M 16M --repeats 5

Each point runs in processes of its own, of one thread each, in which the three take turns. Processor seconds are the
figure to go by on a machine that others use; flops and collectives do not depend on the machine at all.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser
from versions import setting

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
AXES = {"parameters": "parameters", "micro_batches": "micro-batches a step", "processes": "processes"}


@dataclass
class ScalingArguments:
    """What to measure, and where the figures go. Points that the file has already stay in it."""

    axes: list[str] = field(default_factory=lambda: list(AXES), metadata={"help": f"Of {', '.join(AXES)}."})
    sizes: list[str] = field(
        default_factory=lambda: ["1M", "4M", "16M", "60M", "135M"], metadata={"help": "Models, of one micro-batch."}
    )
    micro_batches: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32], metadata={"help": "A step, on the model of 1M parameters."}
    )
    processes: list[int] = field(
        default_factory=lambda: [1, 2, 4], metadata={"help": "By DistributedDataParallel, on the models below."}
    )
    process_sizes: list[str] = field(default_factory=lambda: ["1M", "4M"], metadata={"help": "Models for them."})
    repeats: int = field(default=3, metadata={"help": "Blocks of each that are timed."})
    count: bool = field(default=True, metadata={"help": "Whether to count flops and collectives too, in a block more."})
    output: str = field(default=str(FOLDER / "results"), metadata={"help": "Folder for scaling.json and .png."})


def points(arguments: ScalingArguments) -> list[tuple[str, int, int]]:
    """Return each size, number of micro-batches and number of processes once."""
    by_axis = {
        "parameters": [(size, 1, 1) for size in arguments.sizes],
        "micro_batches": [("1M", count, 1) for count in arguments.micro_batches],
        "processes": [(size, 1, count) for size in arguments.process_sizes for count in arguments.processes],
    }
    return list(dict.fromkeys(point for axis in arguments.axes for point in by_axis[axis]))


def run(point: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of `scaling_run.py` at `point`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={point['processes']}"]
        launcher = torchrun if point["processes"] > 1 else []
        command = [sys.executable, *launcher, str(FOLDER / "scaling_run.py"), json.dumps(point), str(output)]
        path = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{point} failed:\n{result.stderr[-3000:]}")
        return json.loads(output.read_text())


def table(measured: list[dict[str, Any]]) -> Table:
    """Return the ratios of processor seconds and of flops, and a step's collectives."""
    result = Table(title="Median (smallest to largest) ratio of processor seconds; flops; collectives of a step")
    for name in ("parameters", "micro-batches", "processes", "SAM / stock", "X-SAM / stock", "X-SAM / SAM"):
        result.add_column(name, justify="right")
    result.add_column("flops, X-SAM / SAM", justify="right")
    result.add_column("all-reduces, MB: stock, SAM, X-SAM")
    for point in measured:
        by_name = point["contenders"]
        spans = [(by_name["SAM"], "stock"), (by_name["X-SAM"], "stock"), (by_name["X-SAM"], "sam")]
        cells = [span(figures[f"processor_over_{short}"]) for figures, short in spans]
        counted = "flops" in by_name["SAM"]
        flops = f"{by_name['X-SAM']['flops'] / by_name['SAM']['flops']:.3f}" if counted else "-"
        traffic = ", ".join(reductions(figures) for figures in by_name.values()) if counted else "-"
        head = f"{point['parameters']:,}", str(point["micro_batches"]), str(point["processes"])
        result.add_row(*head, *cells, flops, traffic)
    return result


def span(ratio: dict[str, float]) -> str:
    """Return a median and its range as text."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def reductions(figures: dict[str, Any]) -> str:
    """Return the number and the megabytes of a step's all-reduces of tensors as text."""
    traffic = figures["collectives"].get("allreduce", {"count": 0, "bytes": 0})
    return f"{traffic['count']:g}, {traffic['bytes'] / 1e6:.1f}"


def plot(measured: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios to the stock Trainer's processor seconds, and to its flops, along each axis."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    series = {
        "parameters": [p for p in measured if p["micro_batches"] == p["processes"] == 1],
        "micro_batches": [p for p in measured if p["size"] == "1M" and p["processes"] == 1],
        "processes": [p for p in measured if p["size"] == "4M" and p["micro_batches"] == 1],
    }
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        chosen = sorted(series[axis], key=lambda point, axis=axis: point[axis])
        where = [point[axis] for point in chosen]
        for name, color in (("SAM", "tab:blue"), ("X-SAM", "tab:orange")):
            ratios = [point["contenders"][name]["processor_over_stock"] for point in chosen]
            middle = [ratio["median"] for ratio in ratios]
            ends = [
                [ratio["median"] - ratio["min"] for ratio in ratios],
                [ratio["max"] - ratio["median"] for ratio in ratios],
            ]
            panel.errorbar(where, middle, ends, marker="o", capsize=3, color=color, label=name)
            by_flops = [point for point in chosen if "flops" in point["contenders"][name]]
            panel.plot(
                [point[axis] for point in by_flops],
                [p["contenders"][name]["flops"] / p["contenders"]["stock Trainer"]["flops"] for p in by_flops],
                ":",
                color=color,
                label=f"{name}, flops",
            )
        panel.set_xscale("log", base=10 if axis == "parameters" else 2)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("processor seconds over the stock Trainer's")
    panels[0].set_ylim(bottom=0)
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure each point, write the file after each, then show all that it holds."""
    (arguments,) = HfArgumentParser(ScalingArguments).parse_args_into_dataclasses()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "scaling.json"
    known = json.loads(file.read_text())["points"] if file.exists() else []
    measured = {(point["size"], point["micro_batches"], point["processes"]): point for point in known}
    for size, micro_batches, processes in points(arguments):
        point = {"size": size, "micro_batches": micro_batches, "processes": processes, "repeats": arguments.repeats}
        measured[size, micro_batches, processes] = run({**point, "count": arguments.count})
        ordered = sorted(measured.values(), key=lambda p: (p["processes"], p["micro_batches"], p["parameters"]))
        where = {**setting(), "threads": 1}
        file.write_text(json.dumps({"setting": where, "points": ordered}, indent=1) + "\n")
    Console(width=170).print(table(ordered))
    plot(ordered, output / "scaling.png")


if __name__ == "__main__":
    main()

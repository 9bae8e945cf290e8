"""What a step of SAM, of X-SAM and of X-SAM in one pass costs beside the stock Trainer's.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --workloads bert cnn --repeats 3
    python benchmarks/step_cost.py --device cuda --steps 20 --repeats 2

With `--device cuda`, models of a GPU's size from random weights: see `gpu_cost.py`.

All contenders are timed in one process, in turn. On the CPU the time is the process's own processor seconds, which
other programs on the machine disturb little. Operations and tensors' memory are counted, and are the same on every
machine.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import matplotlib
from contenders import LATE, Contender, contenders
from memory import peak_tensor_memory
from pages import filled, markdown
from rich.console import Console
from rich.table import Table
from schedule import refresh_steps
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser
from versions import setting
from workload import Workload

from hf_xsam import XSAMConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAGE = Path(__file__).parent / "README.md"
RESULTS = Path(__file__).parent / "results"
MEMORY_STEPS = 2  # more would take the profiler gigabytes, for a model of 30 layers
STOCK, SAM, OURS, OURS_LATE = "stock Trainer", "SAM", "X-SAM", "X-SAM, the last 30%"
RUN = 300  # steps of a whole run


@dataclass
class CostArguments:
    """What to measure, and where the figures go."""

    workloads: list[str] = field(
        default_factory=list,
        metadata={"help": "Of bert, vit, llama, cnn; on cuda bert, vit, llama, llama-lora, llama-bf16. None is all."},
    )
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where; each has models of its size."})
    steps: int = field(default=40, metadata={"help": "Steps of a block: a multiple of every refresh interval."})
    repeats: int = field(default=5, metadata={"help": "Blocks of each contender that are timed."})
    output: str = field(
        default=str(RESULTS),
        metadata={"help": "Folder for the JSON file and the plot; the default fills README.md too."},
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
    makers = contenders(workload.rho)
    made = {name: make(workload, folder, arguments.steps) for name, make in makers.items()}
    seconds = step_seconds(made, arguments.repeats)
    operations = {name: flops(contender.block) for name, contender in made.items()}
    trainable = sum(p.numel() * p.element_size() for p in made[STOCK].trainer.model.parameters() if p.requires_grad)
    del made
    # Of new ones, whose eigenvector is not there before; the second refresh is beside the optimizer's state.
    makers = contenders(workload.rho, eigen_interval=1)
    peaks = {name: peak_tensor_memory(make(workload, folder, MEMORY_STEPS).block) for name, make in makers.items()}
    return {
        "trainable_bytes": trainable,
        "stock_peak_bytes": peaks[STOCK],
        "seconds": seconds,
        "contenders": {
            name: {
                "over_stock": ratios(seconds, name, STOCK),
                "over_sam": ratios(seconds, name, SAM),
                "forward_backward_equivalents": operations[name] / operations[STOCK],
                "peak_over_stock_bytes": peaks[name] - peaks[STOCK],
            }
            for name in operations
        },
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Return all figures, a contender a line."""
    shown = Table("model", "contender", "step / stock's", "step / SAM's", f"{RUN} steps", "fwd+bwd", "memory")
    for name, figures in results.items():
        for contender, measured in figures["contenders"].items():
            shown.add_row(
                name,
                contender,
                *(
                    "{median:.2f} ({min:.2f} to {max:.2f})".format(**measured[over])
                    for over in ("over_stock", "over_sam")
                ),
                f"{whole_run(contender, figures['contenders']):.2f}",
                f"{measured['forward_backward_equivalents']:.2f}",
                f"{measured['peak_over_stock_bytes'] / figures['trainable_bytes']:+.2f}",
            )
    return shown


def whole_run(contender: str, contenders: dict[str, dict[str, Any]]) -> float:
    """Return the time of a run of `RUN` steps over the stock Trainer's, from the measured steps.

    X-SAM has the denser refreshes of its beginning, late or not, each at the price of one in the steady steps, and
    whatever is not the stock Trainer a first step that is checked by one pass more.
    """
    passes = contenders[contender]["over_stock"]["median"] * RUN
    if contender in (OURS, OURS_LATE):
        config = XSAMConfig(start_step=LATE if contender == OURS_LATE else 0)
        steps = RUN - config.first_step(RUN)
        ours, sam = (contenders[name]["over_stock"]["median"] for name in (OURS, SAM))
        refresh = (ours - sam) * config.eigen_interval
        passes += refresh * (len(refresh_steps(config, steps)) - steps / config.eigen_interval)
    return (passes if contender == STOCK else passes + 1) / RUN


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the step times over the stock Trainer's, a panel a model."""
    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3), sharey=True, squeeze=False)
    for axis, (name, figures) in zip(axes[0], results.items(), strict=True):
        measured = list(figures["contenders"].values())
        middle = [figure["over_stock"]["median"] for figure in measured]
        spread = [
            [value - figure["over_stock"]["min"] for value, figure in zip(middle, measured, strict=True)],
            [figure["over_stock"]["max"] - value for value, figure in zip(middle, measured, strict=True)],
        ]
        axis.barh(list(figures["contenders"]), middle, xerr=spread, color="#4477aa", ecolor="#bbbbbb")
        axis.bar_label(axis.containers[-1], fmt="%.2f", padding=3)
        axis.set(title=name, xlabel="step time / stock Trainer's", xlim=(0, max(middle) * 1.25))
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and write the JSON file and the plot; workloads measured before keep their figures."""
    (arguments,) = HfArgumentParser(CostArguments).parse_args_into_dataclasses()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cuda":
        import gpu_cost

        gpu_cost.run(arguments.workloads, arguments.steps, arguments.repeats, output / "step_cost_cuda.json")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from workloads import WORKLOADS  # whose packages the other device does without

    file = output / "step_cost.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.workloads or WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {**measure(WORKLOADS[name](), arguments, folder), "setting": setting()}
        file.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, output / "step_cost.png")
    Console(width=160).print(table(results))
    if output == RESULTS:
        PAGE.write_text(filled(PAGE, {"step cost": markdown(table(results))}), encoding="utf-8")


if __name__ == "__main__":
    main()

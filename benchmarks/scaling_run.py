"""Run by scaling.py, in one process or in each of several: measures SAM and X-SAM at one point.

    python benchmarks/scaling_run.py '{"size": "4M", "micro_batches": 1, "processes": 1, "repeats": 3}' figures.json

The figures go to the file. Without `"count": false` a block more counts flops and collectives.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from accelerate import PartialState
from collectives import CollectiveCounter
from contenders import TrainerContender, xsam
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed
from workloads import SEED, Workload

from hf_xsam import XSAMConfig

STEPS = XSAMConfig().eigen_interval  # of a block: one refresh
MICRO_BATCH, LENGTH, VOCABULARY = 4, 32, 1024
# By name: width, layers, width within the MLP.
SIZES = {
    "1M": (128, 4, 384),
    "4M": (256, 4, 768),
    "16M": (512, 4, 1536),
    "60M": (1024, 4, 3072),
    "135M": (1024, 10, 3072),
}


class ProcessorTimes(TrainerCallback):
    """Notes the seconds that a step keeps this process's threads busy, which other programs lengthen little."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(time.process_time() - self.began)


def model_config(size: str) -> LlamaConfig:
    """Return a Llama of about as many parameters as `size` says."""
    width, layers, inner = SIZES[size]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def workload(size: str, micro_batches: int) -> Workload:
    """Return a language model that learns random tokens, in steps of so many micro-batches a process."""

    def model() -> nn.Module:
        set_seed(SEED)
        return LlamaForCausalLM(model_config(size))

    tokens = torch.randint(0, VOCABULARY, (1024, LENGTH), generator=torch.Generator().manual_seed(SEED))
    return Workload(
        model,
        [{"input_ids": row, "labels": row} for row in tokens],
        collator=None,  # the Trainer's own
        rho=0.01,
        batch_size=MICRO_BATCH,
        reference_size=0,
        optimizer={"gradient_accumulation_steps": micro_batches, "learning_rate": 1e-4},
    )


def measure(point: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the figures of one point, whose contenders take turns."""
    task = workload(point["size"], point["micro_batches"])
    made = {
        name: TrainerContender(make, task, folder, STEPS)
        for name, make in {
            "stock Trainer": Trainer,
            "SAM": xsam(XSAMConfig(rho=task.rho, alpha=0.0)),
            "X-SAM": xsam(XSAMConfig(rho=task.rho)),
        }.items()
    }
    clocks = {name: ProcessorTimes() for name in made}
    for name, contender in made.items():
        contender.trainer.add_callback(clocks[name])
        contender.block()  # not counted: the first refresh makes more iterations
    times: dict[str, dict[str, list[float]]] = {name: {"processor": [], "wall": []} for name in made}
    names = list(made)
    for repeat in range(point["repeats"]):
        for name in names[repeat % 3 :] + names[: repeat % 3]:
            clocks[name].seconds = []
            times[name]["wall"].append(mean(made[name].block()))
            times[name]["processor"].append(over_processes(mean(clocks[name].seconds)))
    parameters = sum(p.numel() for p in made["SAM"].trainer.model.parameters())
    return {
        **point,
        "parameters": parameters,
        "contenders": {
            name: {
                **{f"{clock}_seconds": median(times[name][clock]) for clock in ("processor", "wall")},
                **{
                    f"{clock}_over_{short}": ratios(times[name][clock], times[reference][clock])
                    for clock in ("processor", "wall")
                    for short, reference in (("stock", "stock Trainer"), ("sam", "SAM"))
                },
                **(counted(made[name]) if point.get("count", True) else {}),
            }
            for name in names
        },
    }


def ratios(times: list[float], references: list[float]) -> dict[str, float]:
    """Return the median, smallest and largest ratio of times taken in the same repeat."""
    values = [time / reference for time, reference in zip(times, references, strict=True)]
    return {"median": median(values), "min": min(values), "max": max(values)}


def over_processes(seconds: float) -> float:
    """Return the mean over the processes."""
    if not PartialState().use_distributed:
        return seconds
    gathered: list[Any] = [None] * PartialState().num_processes
    torch.distributed.all_gather_object(gathered, seconds)
    return mean(gathered)


def counted(contender: TrainerContender) -> dict[str, Any]:
    """Return a step's floating-point operations of matrix products, and its collectives, as means over a block."""
    with FlopCounterMode(display=False) as operations, CollectiveCounter() as collectives:
        contender.block()
    return {
        "flops": operations.get_total_flops() / STEPS,
        "collectives": {
            kind: {"count": traffic.count / STEPS, "bytes": traffic.bytes / STEPS}
            for kind, traffic in sorted(collectives.traffic.items())
        },
    }


def main() -> None:
    """Measure the point that the command line gives."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(json.loads(sys.argv[1]), folder)
    if PartialState().is_main_process:
        Path(sys.argv[2]).write_text(json.dumps(figures))
    if PartialState().use_distributed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

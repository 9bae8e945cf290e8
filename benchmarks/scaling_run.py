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
from contenders import TrainerContender, steady, xsam
from scaling_sizes import LENGTH, MICRO_BATCH, SIZES, VOCABULARY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed
from workload import SEED, Workload

from hf_xsam import XSAMConfig

STEPS = XSAMConfig().eigen_interval  # of a block: one refresh


CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


class Clocks(TrainerCallback):
    """Notes each step's wall-clock seconds, and those for which it kept this process's threads busy."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget the block before."""
        self.seconds = {name: [] for name in CLOCKS}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self.began = {name: clock() for name, clock in CLOCKS.items()}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop them."""
        for name, clock in CLOCKS.items():
            self.seconds[name].append(clock() - self.began[name])


def model_config(size: str) -> LlamaConfig:
    """Return a Llama of about as many parameters as `size` says."""
    sizes = SIZES[size]
    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.width // 64,
        tie_word_embeddings=True,
        attn_implementation="eager",  # matrix products that the flop counter knows, in every pass
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
            "X-SAM": xsam(steady(XSAMConfig, task.rho)),
        }.items()
    }
    clocks = {name: Clocks() for name in made}
    for name, contender in made.items():
        contender.trainer.add_callback(clocks[name])
        contender.block()  # not counted: a first block warms up
    times: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in CLOCKS} for name in made}
    names = list(made)
    for repeat in range(point["repeats"]):
        for name in names[repeat % 3 :] + names[: repeat % 3]:
            made[name].block()
            for clock, seconds in clocks[name].seconds.items():
                times[name][clock].append(over_processes(mean(seconds)))
    parameters = sum(p.numel() for p in made["SAM"].trainer.model.parameters())
    return {
        **point,
        "parameters": parameters,
        "contenders": {
            name: {
                **{f"{clock}_seconds": median(times[name][clock]) for clock in CLOCKS},
                **{
                    f"{clock}_over_{short}": ratios(times[name][clock], times[reference][clock])
                    for clock in CLOCKS
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

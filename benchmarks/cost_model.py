"""What SAM and X-SAM would add to AdamW for 1B, 8B and 70B parameters on 8 to 512 GPUs, as tables of two pages.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --write

The first command prints the tables, the second writes them between the markers of benchmarks/scaling.md and
docs/scaling.md. Nothing here was measured on a GPU.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cost_fit import breakdown, measured, report
from cost_formulas import (
    Llama,
    Policy,
    ddp_traffic,
    extra_copies,
    fsdp_traffic,
    policies,
    state_bytes,
    step_flops,
    vectors,
)
from pages import filled

from hf_xsam import XSAMConfig

MEASUREMENTS = Path(__file__).parent / "scaling.md"
GUIDE = Path(__file__).parent.parent / "docs" / "scaling.md"
GPUS = (8, 64, 512)
TOKENS, LENGTH = 8192, 2048  # a step and GPU, and of a sequence; no accumulation
# The sizes of Llama 3.2 1B, 3.1 8B and 3.1 70B.
MODELS = {
    "1B": Llama(2048, 16, 8192, 128256, 512),
    "8B": Llama(4096, 32, 14336, 128256, 1024, tied=False),
    "70B": Llama(8192, 80, 28672, 128256, 1024, tied=False),
}
RANK = 16
GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """A GPU among others, by its maker's figures, and the utilisation assumed.

    Attributes:
        flops: peak of dense bfloat16 matrix products a second.
        utilisation: share of it that training reaches.
        memory: bytes of a GPU.
        memory_bandwidth: bytes a second.
        link: bytes a second that a GPU sends to GPUs of its own machine.
        network: bytes a second that a GPU sends to other machines.
        machine: GPUs of one machine.
    """

    flops: float = 989e12
    utilisation: float = 0.4
    memory: float = 80e9
    memory_bandwidth: float = 3.35e12
    link: float = 450e9
    network: float = 50e9
    machine: int = 8


H100 = Hardware()


def compute_seconds(policy: Policy, model: Llama, hardware: Hardware) -> float:
    """Return the seconds of a step's matrix products: flops / (peak * utilisation)."""
    return step_flops(policy, model, TOKENS, LENGTH, 1) / (hardware.flops * hardware.utilisation)


def communication_seconds(policy: Policy, model: Llama, gpus: int, sharded: bool, hardware: Hardware) -> float:
    """Return the seconds of a step's collectives: bytes that leave a GPU over the slowest link's bandwidth."""
    if sharded:
        traffic = fsdp_traffic(policy, model, micro_batches=1)
        sent = (gpus - 1) / gpus * (traffic["gathered_bytes"] + traffic["scattered_bytes"])
    else:
        sent = 2 * (gpus - 1) / gpus * ddp_traffic(policy, model.trainable)[1]
    return sent / (hardware.link if gpus <= hardware.machine else hardware.network)


def step_seconds(policy: Policy, model: Llama, gpus: int, sharded: bool, hardware: Hardware) -> tuple[float, float]:
    """Return a step's seconds if communication hides behind computation entirely, and if none of it does.

    max(compute, communication) or their sum, and vectors * 4 P / (W * memory bandwidth), W being 1 unless sharded.
    """
    compute = compute_seconds(policy, model, hardware)
    communication = communication_seconds(policy, model, gpus, sharded, hardware)
    shards = gpus if sharded else 1
    elementwise = vectors(policy, 1) * 4 * model.trainable / shards / hardware.memory_bandwidth
    return max(compute, communication) + elementwise, compute + communication + elementwise


def extra_bytes(policy: Policy, model: Llama, shards: int) -> float:
    """Return the bytes a GPU over AdamW's during forward and backward passes: 4 copies P / W."""
    return 4 * extra_copies(policy)[0] * model.trainable / shards


def ratio(policy: Policy, reference: Policy, model: Llama, gpus: int, sharded: bool) -> str:
    """Return the ratio of step times as text: one figure, or its range over the two cases of overlap."""
    ours, theirs = (step_seconds(p, model, gpus, sharded, H100) for p in (policy, reference))
    low, high = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def gigabytes(size: float) -> str:
    """Return bytes as text in GB, to what matters."""
    return f"{size / GB:.1f}" if size >= 0.1 * GB else f"{size / GB:.2f}"


def table(rank: int, counts: Sequence[int] = GPUS) -> str:
    """Return the table of full finetuning (`rank` 0) or LoRA on so many GPUs, in Markdown."""
    lines = [
        "| model | GPUs, sharding | AdamW's weights and state, GB | SAM adds, GB | X-SAM adds, GB | step: SAM / AdamW "
        "| X-SAM / SAM | paper's policy / SAM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, size in MODELS.items():
        model = replace(size, lora_rank=rank)
        for gpus in counts:
            # LoRA's base model is held whole, and products are exact, where it leaves half of the GPU to activations.
            sharded = not rank or state_bytes(model, 1) > H100.memory / 2
            adamw, sam, xsam, paper = policies(exact=not sharded)
            shards = gpus if sharded else 1
            state = state_bytes(model, shards)
            fits = state + extra_bytes(xsam, model, shards) < H100.memory
            cells = [
                name,
                f"{gpus}, {'FSDP2' if sharded else 'DDP'}",
                gigabytes(state) + ("" if fits else ": too much"),
            ]
            cells += [gigabytes(extra_bytes(policy, model, shards)) for policy in (sam, xsam)]
            pairs = ((sam, adamw), (xsam, sam), (paper, sam))
            cells += [ratio(*pair, model, gpus, sharded) if fits else "-" for pair in pairs]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def settings_table() -> str:
    """Return what some settings cost for 8B on 64 GPUs, in Markdown."""
    model, lora = MODELS["8B"], replace(MODELS["8B"], lora_rank=RANK)
    rows = [
        ("full finetuning, FSDP2", XSAMConfig(), False, model),
        ("", XSAMConfig(eigen_interval=10), False, model),
        ("", XSAMConfig(eigen_interval=20), False, model),
        ("LoRA, DDP", XSAMConfig(), True, lora),
        ("", XSAMConfig(hvp="finite_difference"), False, lora),
        ("", XSAMConfig(eigen_interval=10), True, lora),
        ("", XSAMConfig(eigen_interval=1), True, lora),
    ]
    lines = ["| on 64 GPUs, 8B | settings | X-SAM / SAM |", "| --- | --- | --- |"]
    for what, config, exact, size in rows:
        changed = {name: value for name, value in config.to_dict().items() if value != XSAMConfig().to_dict()[name]}
        words = ", ".join(f"`{name}={value!r}`" for name, value in changed.items()) or "the defaults"
        xsam, sam = Policy("X-SAM", config, exact), policies(exact)[1]
        lines.append(f"| {what} | {words} | {ratio(xsam, sam, size, 64, sharded=not size.lora_rank)} |")
    return "\n".join(lines)


def tables() -> dict[Path, dict[str, str]]:
    """Return the generated parts of each page, by the name of their markers."""
    return {
        MEASUREMENTS: {
            "measured": measured(),
            "breakdown": breakdown(),
            "fit": report(),
            "full finetuning": table(0),
            "LoRA": table(RANK),
        },
        GUIDE: {"full finetuning": table(0, [64]), "LoRA": table(RANK, [64]), "settings": settings_table()},
    }


def main() -> None:
    """Print the tables, or write them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them into the two pages")
    write = parser.parse_args().write
    for page, parts in tables().items():
        if write:
            page.write_text(filled(page, parts), encoding="utf-8")
        else:
            print("\n\n".join(f"{page.parent.name}/{page.name}, {name}\n\n{text}" for name, text in parts.items()))


if __name__ == "__main__":
    main()

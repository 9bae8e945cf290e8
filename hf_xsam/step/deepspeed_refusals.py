"""Which DeepSpeed configurations X-SAM works with: those that are tested, and no other."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..config import XSAMConfig
from .refusals import FSDP2

if TYPE_CHECKING:
    from transformers import Trainer

OLDEST = (0, 19)
# DeepSpeed's classes for stages 1 and 2, and for stage 3.
OPTIMIZERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
INSTEAD = f"Leave it out, or shard the model with FSDP2 ({FSDP2})"
WITHOUT_OFFLOAD = (
    "Leave it out; if memory is short, use stage 3 on more GPUs, gradient_checkpointing=True, or LoRA. A step with "
    "offloaded gradients was wrong without a word"
)

# Settings that decide on speed and memory alone, or that X-SAM does as DeepSpeed says.
TESTED = {
    "": (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("optimizer", "scheduler", "bf16", "fp16", "data_types", "zero_optimization"),
    ),
    "bf16": ("enabled",),
    "fp16": (),
    "data_types": ("grad_accum_dtype",),
    "optimizer": ("type", "params"),
    "zero_optimization": (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm"),
        *("allgather_partitions", "allgather_bucket_size", "ignore_unused_parameters"),
        *("sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
        *("offload_optimizer", "offload_param"),
    ),
    "zero_optimization.offload_optimizer": ("nvme_path",),
    "zero_optimization.offload_param": ("nvme_path",),
}
# On unless a configuration says False, with which they are not tested.
ON_BY_DEFAULT = (
    *("managed_gradient_accumulation", "check_grad_overflow", "load_from_fp32_weights", "compute_grad_norm"),
    *("allgather_partitions", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters"),
    *("memory_efficient_linear", "override_module_apply"),
)
REMEDIES = {
    "zero_optimization.offload_optimizer": WITHOUT_OFFLOAD,
    "zero_optimization.offload_param": WITHOUT_OFFLOAD,
    "fp16": "Use bf16, or DistributedDataParallel with fp16=True",
}


def refuse_deepspeed(configuration: Mapping[str, Any], config: XSAMConfig) -> None:
    """Raise where X-SAM would not do what it says under this configuration of DeepSpeed.

    Raises:
        ValueError: naming the setting, its value and what to use instead.
    """
    installed = version("deepspeed")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ValueError(f"X-SAM needs deepspeed {oldest} or newer, and {installed} is installed: upgrade it.")
    if config.hvp == "exact":
        raise ValueError(
            "XSAMConfig.hvp is 'exact', but under DeepSpeed each process has a part of the weights and gradients only. "
            "Use hvp='finite_difference' or hvp='auto'."
        )
    if config.ascent == "local":
        raise ValueError(
            "XSAMConfig.ascent is 'local', but under DeepSpeed no process has the whole gradient of its own batch. "
            "Use ascent='global', or DistributedDataParallel."
        )
    _refuse_settings(configuration)


def refuse_measuring(trainer: "Trainer") -> None:
    """Raise where a trainer's model is DeepSpeed's, whose backward passes leave gradients to its engine.

    Raises:
        ValueError: with what to do instead.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "Sharpness cannot be measured under DeepSpeed. Measure the saved model: `hf-xsam sharpness`, or "
            "hf_xsam.sharpness.measure in a process without it."
        )


def refuse_engine(engine: Any) -> None:
    """Raise where the engine that DeepSpeed has made of its configuration is none that X-SAM is tested with.

    Raises:
        ValueError: naming what it is, and what to use instead.
    """
    _refuse_settings(engine.config)
    optimizer = type(engine.optimizer).__name__
    if optimizer not in OPTIMIZERS or engine.has_moe_layers or engine.fp16_enabled():
        configuration = describe(engine)
        raise ValueError(
            f"X-SAM does not support DeepSpeed's {optimizer} ({configuration}). Use ZeRO stage 1, 2 or 3 in bfloat16 "
            "or float32, without DeepSpeed's mixture of experts, as recipes/accelerate/zero2.yaml does."
        )


def describe(engine: Any) -> str:
    """Return a configuration's name: stage, dtypes and optimizer."""
    dtype, accumulation = (str(each).removeprefix("torch.") for each in engine.get_data_types())
    kind = type(engine.basic_optimizer).__name__
    return f"ZeRO-{int(engine.zero_optimization_stage())}, {dtype}, grad_accum_dtype {accumulation}, {kind}"


def _refuse_settings(configuration: Mapping[str, Any]) -> None:
    stage = configuration.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"X-SAM does not support DeepSpeed with zero_optimization.stage={stage!r}. Set it to 1, 2 or 3, or use "
            "DistributedDataParallel."
        )
    _refuse_untested(configuration, "")
    accumulation = configuration.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and accumulation not in (None, "auto") and _is_on(configuration.get("bf16")):
        raise _untested("data_types.grad_accum_dtype", accumulation, "Leave it out, or use stage 2 or 3")
    kind = configuration.get("optimizer", {}).get("type")
    if kind is not None and kind.lower() not in ("adam", "adamw"):
        remedy = "Use 'AdamW', or leave the optimizer to the Trainer's argument optim"
        raise _untested("optimizer.type", kind, remedy)


def _refuse_untested(settings: Mapping[str, Any], name: str) -> None:
    """Refuse what is not in `TESTED` unless it is as by default, looking into settings that have some of their own."""
    for key, value in settings.items():
        switched_off = value is False and key in ON_BY_DEFAULT
        if not _is_on(value) and not switched_off:
            continue
        full = f"{name}.{key}" if name else key
        if key not in TESTED[name] or switched_off:
            raise _untested(full, value, REMEDIES.get(name) or REMEDIES.get(full, INSTEAD))
        if full in TESTED:
            _refuse_untested(value, full)


def _is_on(value: Any) -> bool:
    """Return whether a setting asks for something: not where it is off, or left to the Trainer's arguments."""
    if isinstance(value, Mapping):
        switches = [value[key] for key in ("enabled", "device") if key in value]
        return any(map(_is_on, switches or value.values()))
    return value not in (None, False, "none", "auto")


def _untested(name: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"X-SAM does not support DeepSpeed with {name}={value!r}, with which it is not tested. {remedy}.")

"""What X-SAM cannot work with, found out before it goes wrong silently."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..functional.tensors import norm

if torch.distributed.is_available():
    from torch.distributed.fsdp import CPUOffloadPolicy

if TYPE_CHECKING:
    from transformers import Trainer

    from ..config import XSAMConfig

STEPS_INSIDE_BACKWARD = ("Lomo", "AdaLomo")
FSDP2 = "fsdp=True with fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's configuration"

# Those whose loss is a function of weights and batch alone.
TRL_TRAINERS = (
    *("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer"),
    *("ORPOTrainer", "CPOTrainer", "TPOTrainer"),  # of trl.experimental
)


def refuse_unsupported(trainer: "Trainer", config: "XSAMConfig") -> None:
    """Raise where X-SAM would not do what it says under this trainer's arguments.

    Raises:
        ValueError: naming the argument, its value and what to use instead.
    """
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optim or optim.endswith("layerwise"):
        raise _steps_inside_backward(f"optim={optim!r}")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"X-SAM does not support torch.nn.DataParallel, which Trainer uses for {trainer.args.n_gpu} GPUs in one "
            "process. Start the script with `accelerate launch` (DistributedDataParallel), or use one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "X-SAM does not support models that from_pretrained sharded (distributed_config, tp_plan). Load the model "
            f"whole and let the Trainer shard it: {FSDP2}."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for dimension in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{dimension}_size", 1) > 1:
            raise ValueError(
                f"X-SAM does not support {dimension}_size > 1 in parallelism_config (tensor, context and sequence "
                f"parallelism). Use data parallelism alone: dp_shard_size and dp_replicate_size, or {FSDP2}."
            )
    if trainer.is_fsdp_enabled:
        _refuse_under_fsdp(trainer, config)
    _refuse_unsupported_trl(trainer)


def _refuse_under_fsdp(trainer: "Trainer", config: "XSAMConfig") -> None:
    version = trainer.accelerator.state.fsdp_plugin.fsdp_version
    if version != 2:
        raise ValueError(f"X-SAM does not support FSDP{version}, which is deprecated. Use FSDP2: {FSDP2}.")
    if isinstance(trainer.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "X-SAM does not support parameters that FSDP2 offloads to the CPU: set fsdp_offload_params to false in "
            "accelerate's configuration, offload_params in fsdp_config."
        )
    if config.hvp == "exact":
        raise ValueError(
            "XSAMConfig.hvp is 'exact', but parameters sharded by FSDP have no second derivative. "
            "Use hvp='finite_difference' or hvp='auto'."
        )
    if config.ascent == "local":
        raise ValueError(
            "XSAMConfig.ascent is 'local', but under FSDP no process has the whole gradient of its own batch. "
            "Use ascent='global', or DistributedDataParallel."
        )


def _refuse_unsupported_trl(trainer: "Trainer") -> None:
    classes = type(trainer).__mro__
    method = next((kind for kind in classes if kind.__module__.split(".")[0] == "trl"), None)
    if method is None:
        return
    if method.__name__ not in TRL_TRAINERS:
        raise ValueError(
            f"X-SAM does not support TRL's {method.__name__}, only {', '.join(TRL_TRAINERS)}: it runs each step "
            "several times on the same data, and a step that generates its data or updates a state gives another "
            "result each time. Use TRL's own trainer, or generate the answers beforehand for one of these."
        )


def refuse_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise where the optimizer steps within backward passes, or trains more than the model.

    Args:
        optimizer: as the trainer has set it.
        model: whose parameters X-SAM perturbs and corrects, without wrappers.

    Raises:
        ValueError: with what to do instead.
    """
    if (name := type(optimizer).__name__) in STEPS_INSIDE_BACKWARD:
        raise _steps_inside_backward(name)
    if not hasattr(optimizer, "param_groups"):
        return  # stands for one that DeepSpeed makes, by its configuration, of the model's parameters
    known = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := [parameter for parameter in trained if id(parameter) not in known]:
        raise ValueError(
            f"The optimizer trains {len(foreign)} parameters that do not belong to the model, the first of shape "
            f"{tuple(foreign[0].shape)}. X-SAM would neither perturb nor correct them: make their module a part of "
            "the model, or use the stock trainer."
        )


def refuse_gradients_left(parameters: Mapping[str, Tensor]) -> None:
    """Raise where a step begins with gradients, which are of no micro-batch that X-SAM knows.

    Raises:
        RuntimeError: with what to do instead.
    """
    left = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if left and norm(left) > 0:
        raise RuntimeError(
            "X-SAM's training_step found gradients before the first micro-batch of an optimizer step: it was called "
            "twice in one step, or gradients were left in .grad. Call super().training_step once for each batch, with "
            "the whole of it; to split batches, set per_device_train_batch_size and gradient_accumulation_steps."
        )


def refuse_optimizer_in_hooks(parameters: Mapping[str, Tensor]) -> None:
    """Raise where hooks have taken gradients away: optimizers that step within the backward pass do.

    Raises:
        RuntimeError: naming a parameter, with what to do instead.
    """
    for name, parameter in parameters.items():
        if parameter.grad is None and parameter._post_accumulate_grad_hooks:
            raise RuntimeError(
                f"{name!r} has a post-accumulate-grad hook and no gradient after the backward pass: an optimizer "
                "steps inside it, before X-SAM has its second gradient. Step it in the Trainer's loop instead."
            )


def _steps_inside_backward(name: str) -> ValueError:
    return ValueError(
        f"{name} updates the weights inside the backward pass, before X-SAM has its second gradient. "
        "Use an optimizer that updates in step(), such as optim='adamw_torch' or optim='galore_adamw'."
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

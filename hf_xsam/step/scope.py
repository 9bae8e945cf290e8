"""Which parameters X-SAM's vectors span."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

# LoRA's parameters by PEFT's names, DoRA's, AdaLoRA's and their kin's among them: lora_A, lora_B, lora_embedding_A,
# lora_magnitude_vector, ... What PEFT trains beside its adapters is none of them, whatever the adapter is called.
LORA = r"^(?!.*\b(modules_to_save|trainable_tokens_delta)\.).*lora_"
# By name, for models bring classes of their own: LlamaRMSNorm, ConvNextLayerNorm, Qwen3NextRMSNormGated, FP32LayerNorm.
NORM_CLASS = re.compile(r"(RMS|Rms|Layer|Batch|Group|Instance)Norm(1d|2d|3d|1P|Gated)?$")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, tied ones once, as if no module within were compiled."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that take gradients by name."""
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


def parameters_in_scope(model: nn.Module, scope: str, field: str) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of `model` that `scope` names.

    Args:
        model: the model as its author wrote it, without what Accelerate wraps it in.
        scope: "trainable", all of them; "lora", LoRA's; "norm", those of normalization layers; or a regular
            expression that is searched for in their names.
        field: the setting that holds `scope`, for the error.

    Raises:
        ValueError: where there is none.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError(
            f"{field} is {scope!r}, but the model has no trainable parameter: all are frozen. Set requires_grad "
            "on those to train, or load an adapter with is_trainable=True."
        )
    chosen = in_scope(parameters, scope, model)
    if not chosen:
        raise ValueError(
            f"{field} is {scope!r}, which matches no trainable parameter; it must be 'trainable', 'lora' "
            "(a PEFT model with LoRA), 'norm' (normalization layers) or a regular expression found in a trainable "
            f"parameter's name, such as {next(iter(parameters))!r}."
        )
    return chosen


def in_scope(parameters: Mapping[str, nn.Parameter], scope: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return those of the model's `parameters` that `scope` names: see [`parameters_in_scope`]."""
    if scope == "norm":
        norms = set(_normalization_parameters(model))
        return {name: parameter for name, parameter in parameters.items() if parameter in norms}
    pattern = re.compile({"trainable": "", "lora": LORA}.get(scope, scope))
    return {name: parameter for name, parameter in parameters.items() if pattern.search(name)}


@contextmanager
def others_frozen(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, have no parameter of `model` but `parameters` take gradients.

    A second derivative's graph then holds only what theirs needs. It must be used within the block, for checkpointed
    layers are computed again at that time, and must give the same graph.
    """
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in trainable_parameters(model).values() if id(p) not in chosen]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _normalization_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if any(NORM_CLASS.search(kind.__name__) for kind in type(module).__mro__):
            yield from module.parameters(recurse=False)

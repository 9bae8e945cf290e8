"""Which parameters X-SAM's vectors span."""

import re
from collections.abc import Mapping

from torch import nn

# PEFT's names: lora_A, lora_B, lora_embedding_A, lora_magnitude_vector, ...
NAMED_SCOPES = {"trainable": "", "lora": "lora_"}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that take gradients by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_scope(parameters: Mapping[str, nn.Parameter], scope: str) -> dict[str, nn.Parameter]:
    """Return those of `parameters` that `scope` names: "trainable", "lora" or a regular expression.

    Raises:
        ValueError: where there is none.
    """
    pattern = re.compile(NAMED_SCOPES.get(scope, scope))
    chosen = {name: parameter for name, parameter in parameters.items() if pattern.search(name)}
    if not chosen:
        raise ValueError(
            f"XSAMConfig.eigen_scope is {scope!r}, which matches no trainable parameter; it must be 'trainable', "
            "'lora' (for a PEFT model) or a regular expression found in a trainable parameter's name, such as "
            f"{next(iter(parameters), None)!r}."
        )
    return chosen

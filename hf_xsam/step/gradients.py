"""What backward passes leave in `.grad`: read, and set aside."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..functional.tensors import norm


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return what the last backward passes left in `.grad`, zeros where they left nothing.

    Raises:
        ValueError: for sparse gradients, which X-SAM cannot perturb along.
    """
    if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
        raise ValueError("X-SAM needs dense gradients; build the model's embeddings with sparse=False.")
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def with_gradient(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of `parameters` that the last backward passes reached."""
    return {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}


def gradient_norm(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of the gradient over those of `parameters` that have one, 0-dimensional."""
    return norm(gradients(list(with_gradient(parameters).values())))


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Give the block parameters without gradients, and put those back that they had."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad()
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient

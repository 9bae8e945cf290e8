"""The modes that forward passes run in: training or evaluation, attention's kernel, sharded or whole parameters."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule


def twice_differentiable_attention() -> AbstractContextManager[None]:
    """Have scaled_dot_product_attention use its math kernel; the fused ones have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Have recurrent layers do without cuDNN, which computes no backward pass in evaluation mode, nor a second one."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def reshard(model: nn.Module) -> None:
    """Have a model under FSDP2 hold its sharded parameters, where a forward pass alone has left it whole ones."""
    for module in model.modules():
        if torch.distributed.is_available() and isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put each module back, after the block, into training or evaluation mode as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode within the block; its loss can be differentiated there."""
    with modes_restored(model), differentiable_recurrence(model):
        model.eval()
        yield


@contextmanager
def forward_passes_evaluated(model: nn.Module) -> Iterator[None]:
    """Have forward passes within the block run in evaluation mode, also where a training step calls them.

    Dropout is off, and batch norm takes its running statistics. Modules that checkpoint their activations stay in
    training mode, without which they would not; those within them do not. Nor do quantized layers leave it, some of
    which repack their weights to evaluate. The modes hold until the end of the block, for checkpointed modules run
    again in the backward pass.
    """

    def stays(module: nn.Module) -> bool:
        quantized = any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False))
        return quantized or getattr(module, "gradient_checkpointing", False)

    def evaluate(module: nn.Module, inputs: object) -> None:
        for part in evaluated:
            part.training = False

    evaluated = [module for module in model.modules() if not stays(module)]
    with modes_restored(model), differentiable_recurrence(model):
        handle = model.register_forward_pre_hook(evaluate)
        try:
            yield
        finally:
            handle.remove()

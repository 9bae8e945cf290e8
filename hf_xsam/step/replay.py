"""Running training steps again: the same random numbers, the buffers untouched, the loss caught."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .side_effects import Buffers, RandomState

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

MEDIA = ("pixel_values", "image", "video", "audio", "input_features")  # how inputs beside a text are called


@dataclass
class MicroBatch:
    """What a call of `training_step` was given, enough to make the same call again, and the loss it returned."""

    inputs: Any
    num_items_in_batch: Tensor | float | None
    random_state: RandomState
    loss: Tensor
    accumulation_steps: int

    def pieces(self, share: float) -> list[tuple["MicroBatch", float]]:
        """Return the first `share` of the examples, at least one, in pieces of a quarter of the micro-batch or less.

        Where the inputs do not show which rows are an example's, the micro-batch is the only piece.

        Returns:
            Each piece and its share of the examples chosen.
        """
        if not isinstance(self.inputs, Mapping) or _rows_mislead(self.inputs):
            return [(self, 1.0)]
        values = list(self.inputs.values())
        sizes = {len(value) if isinstance(value, Tensor) and value.ndim > 0 else None for value in values}
        size = sizes.pop() if len(sizes) == 1 else None
        if not size:
            return [(self, 1.0)]
        chosen = ceil(share * size)
        count = min(chosen, ceil(4 * share))
        bounds = [chosen * i // count for i in range(count + 1)]
        return [(self._rows(start, stop, size), (stop - start) / chosen) for start, stop in pairwise(bounds)]

    def _rows(self, start: int, stop: int, size: int) -> "MicroBatch":
        inputs = type(self.inputs)({name: value[start:stop] for name, value in self.inputs.items()})
        # A loss that is normalized by the items of the whole window gets those of the rows: on average their share.
        items = None if self.num_items_in_batch is None else self.num_items_in_batch * ((stop - start) / size)
        return replace(self, inputs=inputs, num_items_in_batch=items)


def copied(inputs: Any) -> Any:
    """Return a batch like `inputs` with tensors of its own: a step may change them in place, or take `labels` out."""
    return recursively_apply(torch.clone, copy(inputs))


def _rows_mislead(inputs: Mapping[str, Any]) -> bool:
    """Return whether as many rows as texts may be a coincidence: images of all texts in one tensor, M-RoPE's axes."""
    with_media = "input_ids" in inputs and any(name.startswith(MEDIA) for name in inputs)
    return with_media or getattr(inputs.get("position_ids"), "ndim", 2) > 2


@dataclass
class Replay:
    """The training steps of one accumulation window, to run again at other weights with the same random numbers.

    Attributes:
        training_step: the stock step of a model and a micro-batch: forward, loss scaling and backward.
        accelerator: the trainer's.
        model: as prepared by the accelerator.
        micro_batches: the window, in order.
        buffers: the model's before the window, from which its passes start again.
    """

    training_step: Callable[[nn.Module, MicroBatch], Tensor]
    accelerator: Accelerator
    model: nn.Module
    micro_batches: list[MicroBatch]
    buffers: Buffers

    def run(self, synchronize: bool = True) -> Tensor:
        """Leave the window's gradient in `.grad`, averaged over the processes if `synchronize`; return its loss."""
        self.model.zero_grad()
        self.buffers.restore()
        # FSDP holds whole gradients between those that synchronize, which GradientAccumulationPlugin lets users forgo.
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        losses = []
        for micro_batch in self.micro_batches:
            synchronizes = synchronize and (each or micro_batch is self.micro_batches[-1])
            with nullcontext() if synchronizes else self.accelerator.no_sync(self.model):
                losses.append(self._step(self.model, micro_batch))
        return torch.stack(losses).sum()

    def gradient(self, parameters: Sequence[Tensor], synchronize: bool = True) -> list[Tensor]:
        """Return the window's gradient at the weights as they stand, zero where the loss does not reach; leave none."""
        self.run(synchronize)
        gradient = gradients(parameters)
        self.model.zero_grad()
        return gradient

    def part(self, fraction: float, rows_are_examples: bool = True) -> list[tuple[MicroBatch, float]]:
        """Return a part of the window, and with which weights its losses add up to an estimate of the window's.

        Args:
            fraction: share of the examples, above 0 to 1: of whole micro-batches, or of each one's rows.
            rows_are_examples: whether micro-batches may be split. Below 1, they are taken in pieces then, for a graph
                of second order takes about four times the memory of the training step's own.
        """
        count = len(self.micro_batches)
        chosen = self.micro_batches[: ceil(fraction * count)]
        if fraction == 1 or not rows_are_examples:
            return [(micro_batch, count / len(chosen)) for micro_batch in chosen]
        return [
            (piece, weight * count / len(chosen))
            for micro_batch in chosen
            for piece, weight in micro_batch.pieces(fraction * count / len(chosen))
        ]

    def losses(self, part: Sequence[tuple[MicroBatch, float]]) -> Iterator[Tensor]:
        """Compute the weighted losses of `part`, each with a graph that can be differentiated twice; no backward pass.

        They are scaled as the window's are.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        for micro_batch, weight in part:
            with twice_differentiable_attention(), _loss_caught(self.accelerator) as caught:
                self._step(model, micro_batch)
            yield from (weight * loss for loss in caught)

    def _step(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        micro_batch.random_state.restore()
        return self.training_step(model, micro_batch)


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return what the last backward passes left in `.grad`, zeros where they left nothing.

    Raises:
        ValueError: for sparse gradients, which X-SAM cannot perturb along.
    """
    if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
        raise ValueError("X-SAM needs dense gradients; build the model's embeddings with sparse=False.")
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def with_gradient(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those of `parameters` that the last backward passes reached."""
    return {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}


def twice_differentiable_attention() -> AbstractContextManager[None]:
    """Have scaled_dot_product_attention use its math kernel; the fused ones have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


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
    """Hold the model in evaluation mode within the block."""
    with modes_restored(model):
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
    with modes_restored(model):
        handle = model.register_forward_pre_hook(evaluate)
        try:
            yield
        finally:
            handle.remove()


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


@contextmanager
def _loss_caught(accelerator: Accelerator) -> Iterator[list[Tensor]]:
    """Catch the losses that training steps within the block hand to `accelerator.backward`.

    The caught losses are scaled as their gradients would have been (gradient accumulation, GradScaler).
    """
    losses: list[Tensor] = []

    def catch(loss: Tensor, **kwargs: Any) -> None:
        loss = loss / accelerator.gradient_accumulation_steps
        losses.append(loss if accelerator.scaler is None else accelerator.scaler.scale(loss))

    with patch.object(accelerator, "backward", catch):
        yield losses

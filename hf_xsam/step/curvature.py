"""Hessian-vector products of a training loss under Accelerate: GradScaler, processes, and what the model allows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..functional.power_iteration import (
    HessianVectorProduct,
    exact_hessian_vector_product,
    finite_difference_hessian_vector_product,
    finite_difference_step,
)
from ..functional.tensors import is_sharded, multiply
from .precision import coarsest_dtype, holds_everywhere, loss_scale
from .refusals import double_backward_obstacle, hidden_parameters, untrusted_operation
from .replay import forward_passes_evaluated, gradients, gradients_set_aside, twice_differentiable_attention
from .scope import others_frozen

logger = logging.getLogger(__name__)

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's


@dataclass
class Loss:
    """A loss at the weights as they stand, in the two forms that products are made from.

    Attributes:
        terms: computes the terms whose sum is this process's loss, GradScaler's factor included, each with its graph.
        gradient: computes its gradient with respect to given parameters.
        gradient_is_local: whether `gradient` is of this process's loss, not of the mean over the processes.
        single_term: whether there is one term only, so that its graph may be kept between products.
    """

    terms: Callable[[], Iterator[Tensor]]
    gradient: Callable[[Sequence[Tensor]], list[Tensor]]
    gradient_is_local: bool
    single_term: bool


def mean_loss(
    accelerator: Accelerator,
    model: nn.Module,
    batch_losses: Sequence[Callable[[], Tensor]],
    sharded: bool,
    weights: Sequence[float] | None = None,
) -> Loss:
    """Return the mean of `batch_losses`; its gradient replaces what the model's parameters have in `.grad`.

    Args:
        accelerator: the trainer's.
        model: that the losses are of, without wrappers.
        batch_losses: each computes the loss of a batch.
        sharded: whether the model's parameters are, so that its backward pass averages over the processes.
        weights: how much each loss counts, in any unit; None is alike.
    """
    counts = [1.0] * len(batch_losses) if weights is None else weights
    total = sum(counts)

    def terms() -> Iterator[Tensor]:
        for batch_loss, count in zip(batch_losses, counts, strict=True):
            with twice_differentiable_attention(), accelerator.autocast():
                loss = batch_loss()
            yield loss_scale(accelerator).to(loss.device) * loss * (count / total)

    def gradient(parameters: Sequence[Tensor]) -> list[Tensor]:
        model.zero_grad()
        for term in terms():
            term.backward()
        return gradients(parameters)

    return Loss(terms, gradient, gradient_is_local=not sharded, single_term=len(batch_losses) == 1)


def choose_method(
    accelerator: Accelerator,
    asked: str,
    loss: Loss,
    parameters: Sequence[Tensor],
    model: nn.Module,
    obstacle: str | None = None,
) -> str:
    """Return "exact" or "finite_difference": what is `asked`, or for "auto" exact where the model allows it.

    Args:
        accelerator: the trainer's; all its processes get the same answer.
        asked: `XSAMConfig.hvp`.
        loss: any loss of `model`.
        parameters: what products are taken with respect to.
        model: that one, without wrappers.
        obstacle: to exact products, where one is known without trying.

    Raises:
        RuntimeError: where "exact" is asked for and the model has no second derivative.
    """
    if asked == "finite_difference":
        return asked
    if any(is_sharded(parameter) for parameter in parameters):
        obstacle = "sharded parameters have no second derivative"
    elif obstacle is None:
        # With nothing frozen: operations whose input takes no gradient do not show in the graph.
        # Aside, for a step that calls `loss.backward()` itself leaves gradients.
        with forward_passes_evaluated(model), twice_differentiable_attention(), gradients_set_aside(model):
            whole = next(loss.terms(), None)
            if whole is None:
                obstacle, doubt = "the training step hands no loss to accelerator.backward", None
            else:
                obstacle, doubt = hidden_parameters(whole), untrusted_operation(whole)
            if doubt and asked == "exact":
                logger.warning("hvp is 'exact', but %s: compare with hvp='finite_difference'.", doubt)
            else:
                obstacle = obstacle or doubt
            del whole
            if obstacle is None:
                with others_frozen(model, parameters):
                    obstacles = map(partial(double_backward_obstacle, parameters=parameters), loss.terms())
                    obstacle = next(filter(None, obstacles), None)
    exact = holds_everywhere(accelerator, torch.tensor(obstacle is None, device=accelerator.device))
    method = "exact" if exact else "finite_difference"
    allowed = "every operation of the model has a second derivative"
    reason = obstacle or (allowed if exact else "another process found an obstacle")
    if asked == "exact" and not exact:  # on every process, lest one wait for another that has raised
        raise RuntimeError(
            f"hvp is 'exact', but the model has no second derivative: {reason.rstrip('.')}. "
            "Use hvp='finite_difference' or hvp='auto'."
        )
    logger.info("X-SAM computes Hessian-vector products with hvp=%r: %s.", method, reason)
    return method


def mean_over_processes(accelerator: Accelerator, tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean over the processes of each of `tensors`, which are overwritten.

    They travel as DDP's gradients do, in buckets of about 25 MiB: the fewer all-reduces, the fewer latencies, and no
    second copy of them all. `accelerator.reduce` alone makes one all-reduce a tensor.

    Args:
        accelerator: the trainer's.
        tensors: shaped alike on every process.
    """
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        parts = accelerator.reduce(flat, reduction="mean").split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    return tensors


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbours of one dtype and device together, a bucket of at least `BUCKET_BYTES` each but for the last."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        of_another_kind = bucket and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if size >= BUCKET_BYTES or of_another_kind:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@contextmanager
def hessian_vector_product(
    accelerator: Accelerator,
    method: str,
    loss: Loss,
    parameters: Sequence[Tensor],
    model: nn.Module,
    gradient: Sequence[Tensor] | None = None,
) -> Iterator[HessianVectorProduct]:
    """Yield v -> H v of the unscaled mean over the processes of `loss`, to be used within the block.

    Args:
        accelerator: the trainer's.
        method: "exact" or "finite_difference".
        loss: L, the same number of terms on each process.
        parameters: what H is taken with respect to.
        model: whose loss it is, without wrappers.
        gradient: what `loss.gradient(parameters)` gives at the weights as they stand, where it is known already.
    """

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        result = scaled(vector)
        if accelerator.scaler is not None:
            multiply(result, 1 / loss_scale(accelerator))
        return mean_over_processes(accelerator, result) if reduce else result

    reduce = accelerator.num_processes > 1 and (method == "exact" or loss.gradient_is_local)
    if method == "exact":
        # Attention's kernel is chosen again in the backward pass, where gradient checkpointing computes it anew.
        with others_frozen(model, parameters), forward_passes_evaluated(model), twice_differentiable_attention():
            scaled = exact_hessian_vector_product(loss.terms, parameters, keep_graph=loss.single_term)
            yield product
    else:
        # Nothing is frozen: DDP and FSDP wait for all gradients.
        known = loss.gradient(parameters) if gradient is None else gradient
        step = finite_difference_step(parameters, coarsest_dtype(accelerator, model))
        scaled = finite_difference_hessian_vector_product(lambda: loss.gradient(parameters), parameters, known, step)
        yield product

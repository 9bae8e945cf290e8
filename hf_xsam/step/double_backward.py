"""Whether a training loss can be differentiated twice: found out from its graph, and by trying."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..functional.tensors import is_sharded, norm
from .gradients import gradients_set_aside
from .loss import Loss
from .modes import forward_passes_evaluated, twice_differentiable_attention
from .processes import holds_everywhere
from .refusals import first_line
from .scope import others_frozen

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

Method = Literal["exact", "finite_difference"]

# bitsandbytes' 4-bit and 8-bit layers: their backward passes multiply by the weights, in operations that autograd sees.
TWICE_DIFFERENTIABLE = ("MatMul4BitBackward", "MatMul8bitFpBackward", "MatMul8bitLtBackward")
REENTRANT_CHECKPOINT = "CheckpointFunctionBackward"

NO_PATH = "the loss has no path to the weights, though its backward pass gives them gradients"


def choose_method(
    accelerator: Accelerator,
    asked: str,
    loss: Loss,
    parameters: Sequence[Tensor],
    model: nn.Module,
    obstacle: str | None = None,
    gradient: Sequence[Tensor] | None = None,
) -> Method:
    """Return what is `asked`, or for "auto" exact products where the model allows them.

    Args:
        accelerator: the trainer's; all its processes get the same answer.
        asked: `XSAMConfig.hvp`.
        loss: any loss of `model`.
        parameters: what products are taken with respect to.
        model: that one, without wrappers.
        obstacle: to exact products, where one is known without trying.
        gradient: what `loss.gradient(parameters)` gives, where it is known already.

    Raises:
        RuntimeError: where "exact" is asked for and the model has no second derivative.
    """
    if asked == "finite_difference":
        return "finite_difference"
    if any(is_sharded(parameter) for parameter in parameters):
        obstacle = "sharded parameters have no second derivative"
    obstacle = obstacle or find_obstacle(loss, parameters, model, trust=asked == "exact")
    # Together, for the gradient may take all processes.
    if holds_everywhere(accelerator, obstacle == NO_PATH):
        known = loss.gradient(parameters) if gradient is None else gradient
        obstacle = NO_PATH if norm(known) > 0 else None
    elif obstacle == NO_PATH:
        obstacle = None
    exact = holds_everywhere(accelerator, obstacle is None)
    method: Method = "exact" if exact else "finite_difference"
    allowed = "every operation of the model has a second derivative"
    reason = obstacle or (allowed if exact else "another process found an obstacle")
    if asked == "exact" and not exact:  # on every process, lest one wait for another that has raised
        raise RuntimeError(
            f"hvp is 'exact', but the model has no second derivative: {reason.rstrip('.')}. "
            "Use hvp='finite_difference' or hvp='auto'."
        )
    logger.info("X-SAM computes Hessian-vector products with hvp=%r: %s.", method, reason.rstrip("."))
    return method


def find_obstacle(loss: Loss, parameters: Sequence[Tensor], model: nn.Module, trust: bool) -> str | None:
    """Return why products of `loss` cannot be had by double backward, or None if they can: it computes one.

    `NO_PATH` says only that the graph holds none of `parameters`.

    Args:
        loss: of `model`.
        parameters: what products are taken with respect to.
        model: without wrappers.
        trust: whether operations whose second derivative may be wrong are warned of, and are no obstacle.
    """
    try:
        # Aside, for a step that calls `loss.backward()` itself leaves gradients.
        with forward_passes_evaluated(model), twice_differentiable_attention(), gradients_set_aside(model):
            # With nothing frozen: operations whose input takes no gradient do not show in the graph.
            whole = next(loss.terms(), None)
            if whole is None:
                return "the training step does not pass its loss to accelerator.backward"
            if hidden := hidden_parameters(whole):
                return hidden
            if doubt := untrusted_operation(whole):
                if not trust:
                    return doubt
                logger.warning("hvp is 'exact', but %s: compare with hvp='finite_difference'.", doubt)
            del whole
            with others_frozen(model, parameters):
                # Not a loop, which would hold on to a loss, and its graph, while the next one is computed.
                found = list(map(partial(double_backward_obstacle, parameters=parameters), loss.terms()))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the user's code, which may take another path in evaluation mode
        return f"the training step fails in evaluation mode, {first_line(error)}"
    if set(found) == {NO_PATH}:
        return NO_PATH
    return next((reason for reason in found if reason not in (None, NO_PATH)), None)


def obstacle_in_arguments(args: "TrainingArguments") -> str | None:
    """Return what in a trainer's arguments is in the way of exact products, or None."""
    if getattr(args, "activation_offloading", False):  # TRL's
        return (
            "activation_offloading lets saved activations be read only once, and a second derivative reads them twice"
        )
    return None


def hidden_parameters(loss: Tensor) -> str | None:
    """Return why the graph of `loss` lacks parameters that it is computed from, or None: reentrant checkpointing."""
    if REENTRANT_CHECKPOINT in _python_functions_in_graph(loss):
        return (
            "gradient checkpointing has a second derivative only with "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    return None


def untrusted_operation(loss: Tensor) -> str | None:
    """Return what in the graph of `loss` may have a wrong second derivative without a word, or None.

    Python-defined operations may: fused kernels such as FlashAttention's and Liger's.
    """
    for name in _python_functions_in_graph(loss):
        if name not in (*TWICE_DIFFERENTIABLE, REENTRANT_CHECKPOINT):
            return f"the second derivative of the Python-defined operation {name} cannot be trusted"
    return None


def double_backward_obstacle(loss: Tensor, parameters: Sequence[Tensor]) -> str | None:
    """Return why the Hessian-vector product of `loss` cannot be had by double backward, or None if it can.

    `NO_PATH` where none of `parameters` is in its graph: then the product is zero, unless the loss has a backward pass
    of its own.
    """
    if not loss.requires_grad:
        return NO_PATH
    try:
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        if all(g is None for g in gradient):
            return NO_PATH
        curved = [g for g in gradient if g is not None and g.requires_grad]
        second: tuple[Tensor | None, ...] = ()
        if curved:
            second = torch.autograd.grad(curved, parameters, [torch.zeros_like(g) for g in curved], allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return first_line(error)
    # Seen with layer norms of float16 weights, whose second derivative has the third power of 1 / deviation. Where the
    # first one is not finite either, it says nothing.
    if _finite(gradient) and not _finite(second):
        return f"the second derivative overflows in {curved[0].dtype}"
    return None


def _finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)


def _python_functions_in_graph(loss: Tensor) -> list[str]:
    stack, seen = [loss.grad_fn], {loss.grad_fn}
    names: list[str] = []
    while stack:
        node = stack.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            names.append(node.name())
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return names

"""A loss in the two forms that Hessian-vector products are made from: terms with their graphs, and a gradient."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor, nn

from .gradients import gradients
from .modes import twice_differentiable_attention
from .precision import loss_scale


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
            if not term.requires_grad:
                raise ValueError(
                    "The loss has no gradient in evaluation mode, as if computed under torch.no_grad: measure a loss "
                    "that depends on the weights there."
                )
            term.backward()
        return gradients(parameters)

    return Loss(terms, gradient, gradient_is_local=not sharded, single_term=len(batch_losses) == 1)

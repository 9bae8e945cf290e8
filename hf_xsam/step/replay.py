"""The micro-batches of an optimizer step, and how to run them again: with the same random numbers and buffers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..functional.tensors import norm
from .gradients import gradients, gradients_set_aside
from .loss import Loss
from .modes import forward_passes_evaluated, twice_differentiable_attention
from .processes import all_finite, holds_everywhere
from .random_state import RandomState
from .side_effects import Moment, Surroundings, copied, replaced

StepAgain = Callable[[nn.Module, "MicroBatch"], Tensor]

MEDIA = ("pixel_values", "image", "video", "audio", "input_features")  # how inputs beside a text are called


# How far the losses of a micro-batch's pieces may be from its own, relative: means over tokens weight rows unevenly.
ADDS_UP = 0.05


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


def _rows_mislead(inputs: Mapping[str, Any]) -> bool:
    """Return whether as many rows as texts may be a coincidence: images of all texts in one tensor, M-RoPE's axes."""
    with_media = "input_ids" in inputs and any(name.startswith(MEDIA) for name in inputs)
    return with_media or getattr(inputs.get("position_ids"), "ndim", 2) > 2


@dataclass
class Window:
    """The training steps of one accumulation window, to run again at other weights with the same random numbers.

    Attributes:
        training_step: the stock step of a model and a micro-batch: forward, loss scaling and backward.
        accelerator: the trainer's.
        model: as prepared by the accelerator.
        surroundings: what the steps draw from and write into; each pass starts from the same state of them. None if the
            steps are not to be run again: then nothing is kept.
        marks: for the echo check, where it is due: see [`hf_xsam.step.echo`].
        micro_batches: the window so far, in order.
        after: the moment after the first passes, from which the losses of a part start.
    """

    training_step: StepAgain
    accelerator: Accelerator
    model: nn.Module
    surroundings: Surroundings | None
    marks: Mapping[str, Any] | None = None
    micro_batches: list[MicroBatch] = field(default_factory=list)
    after: Moment | None = None

    def __post_init__(self) -> None:
        if self.surroundings is not None:
            self.before = self.surroundings.before_step()

    def kept(self, inputs: Any) -> tuple[Any, RandomState] | None:
        """Return what it takes to run the next micro-batch again, before its first pass."""
        return None if self.surroundings is None else (copied(inputs), self.surroundings.random_state())

    def add(self, kept: tuple[Any, RandomState] | None, items: Any, loss: Tensor, accumulation_steps: int) -> None:
        """Add the micro-batch whose first pass is over: see [`MicroBatch`]."""
        if kept is not None:
            self.micro_batches.append(MicroBatch(kept[0], items, kept[1], loss, accumulation_steps))

    @contextmanager
    def passes_undone(self) -> Iterator[None]:
        """Undo within the block what passes do beside gradients: see [`Surroundings.undone`]."""
        if self.surroundings is None:
            yield
        else:
            with self.surroundings.undone() as self.after:
                yield

    @property
    def loss(self) -> Tensor:
        """Return the loss of the first passes, 0-dimensional."""
        return torch.stack([micro_batch.loss for micro_batch in self.micro_batches]).sum()

    def run(self, synchronize: bool = True) -> Tensor:
        """Leave the window's gradient in `.grad`, averaged over the processes if `synchronize`; return its loss."""
        self.zero_grad()
        self.before.restore()
        # FSDP holds whole gradients between those that synchronize, which GradientAccumulationPlugin lets users forgo.
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        losses = []
        for micro_batch in self.micro_batches:
            synchronizes = synchronize and (each or micro_batch is self.micro_batches[-1])
            with self._synchronizing(synchronizes):
                losses.append(self._step(self.model, micro_batch))
        return torch.stack(losses).sum()

    def gradient(self, parameters: Sequence[Tensor], synchronize: bool = True) -> list[Tensor]:
        """Return the window's gradient at the weights as they stand, zero where the loss does not reach; leave none."""
        self.run(synchronize)
        gradient = gradients(parameters)
        self.zero_grad()
        return gradient

    def zero_grad(self) -> None:
        """Leave no gradient."""
        self.model.zero_grad()

    def gradients_set_aside(self) -> AbstractContextManager[None]:
        """Give the block parameters without gradients, and put those back that they had."""
        return gradients_set_aside(self.model)

    def optimizer_waits(self) -> AbstractContextManager[None]:
        """Have no optimizer step within the block; none does but DeepSpeed's."""
        return nullcontext()

    def end(self) -> None:
        """End the first passes, whose gradient is in `.grad`."""

    def step_optimizer(self) -> None:
        """Step, where the Trainer does not."""

    def loss_of_part(self, fraction: float, rows_are_examples: bool, synchronize: bool) -> Loss:
        """Return the window's loss for Hessian-vector products: exact ones take a part of the examples.

        Args:
            fraction: see [`Window.part`].
            rows_are_examples: likewise.
            synchronize: whether gradients are averaged over the processes.
        """
        part = self.part(fraction, rows_are_examples)
        return Loss(
            terms=lambda: self.losses(part),
            gradient=lambda parameters: self.gradient(parameters, synchronize),
            gradient_is_local=not synchronize,
            single_term=len(part) == 1,
        )

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

    def rows_add_up(self) -> bool:
        """Return whether the losses of a micro-batch's pieces add up to its own, on all processes.

        They do not where a row is no example of its own: in contrastive losses, or with indices into the whole batch.
        """
        whole = self.micro_batches[0]
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        try:
            with torch.no_grad(), forward_passes_evaluated(model):
                of_pieces = torch.stack(list(self.losses(whole.pieces(1.0)))).sum()
                own = torch.stack(list(self.losses([(whole, 1.0)]))).sum()
            adds_up = bool((of_pieces - own).abs() <= ADDS_UP * own.abs())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the user's code, which is given rows that are no batch
            adds_up = False
        return holds_everywhere(self.accelerator, adds_up)

    def losses(self, part: Sequence[tuple[MicroBatch, float]]) -> Iterator[Tensor]:
        """Compute the weighted losses of `part`, each with a graph that can be differentiated twice; no backward pass.

        They are scaled as the window's are.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        for micro_batch, weight in part:
            if self.after is not None:
                self.after.restore()
            with twice_differentiable_attention(), _loss_caught(self.accelerator) as caught:
                try:
                    self._step(model, micro_batch)
                except IndexError as error:
                    if any(micro_batch is whole for whole in self.micro_batches):
                        raise
                    raise IndexError(
                        f"{error} (X-SAM ran a part of the batch's rows). Where a row is no example of its own, set "
                        "rows_are_examples = False in the trainer's class."
                    ) from error
            yield from (weight * loss for loss in caught)

    def leave_harmless_gradient(self, parameters: Sequence[Tensor]) -> None:
        """Leave in `.grad` what does no harm, in place of a corrected gradient that would not be finite.

        With a GradScaler: infinity, at which it skips the step and lowers its scale. Else the stock Trainer's gradient,
        or where that is not finite none at all, so that the optimizer leaves the weights and its state.
        """
        if self.accelerator.scaler is not None:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)
        elif self.surroundings is None or not all_finite(self.accelerator, [self.run(), norm(gradients(parameters))]):
            self.zero_grad()

    def _synchronizing(self, synchronizes: bool) -> AbstractContextManager[None]:
        return nullcontext() if synchronizes else self.accelerator.no_sync(self.model)

    def _step(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        micro_batch.random_state.restore()
        return self.training_step(model, micro_batch)


@contextmanager
def _loss_caught(accelerator: Accelerator) -> Iterator[list[Tensor]]:
    """Catch the losses that training steps within the block hand to `accelerator.backward`.

    The caught losses are scaled as their gradients would have been (gradient accumulation, GradScaler).
    """
    losses: list[Tensor] = []

    def catch(loss: Tensor, **kwargs: Any) -> None:
        loss = loss / accelerator.gradient_accumulation_steps
        losses.append(loss if accelerator.scaler is None else accelerator.scaler.scale(loss))

    with replaced(accelerator, "backward", catch):
        yield losses

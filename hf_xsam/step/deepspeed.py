"""X-SAM's passes under DeepSpeed's ZeRO, whose engine holds the gradients and steps within the last backward pass.

Each process sees parts: what it holds of the weights that the passes compute with, in the engine's own memory, and of
the gradient. The master weights and the optimizer stay as they are until the engine steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..functional.perturbation import perturbed
from ..functional.tensors import Part, Place, norm
from .deepspeed_refusals import describe, refuse_engine
from .scope import trainable_parameters
from .side_effects import replaced

# The gradient that the engine steps with may differ from X-SAM's by rounding and by clipping's 1e-6.
TOLERANCE = 1e-4


@dataclass
class Home:
    """Where the engine has this process's part of a parameter.

    Attributes:
        piece: the weights.
        place: of them in the parameter.
        group: the engine's group that it is in.
        offset: of its gradient in what this process holds of that group's gradient, flattened.
    """

    piece: Tensor
    place: Place
    group: int
    offset: int


class Engine:
    """A DeepSpeed engine as X-SAM needs it; each stage of ZeRO has a subclass.

    Args:
        engine: prepared by Accelerate.

    Attributes:
        parts: what this process holds of each trainable parameter, by name. Their `.grad` is its part of the gradient,
            in float32 and in memory of its own, once `take_gradient` has read it.
    """

    def __init__(self, engine: Any) -> None:
        refuse_engine(engine)
        self.engine, self.optimizer = engine, engine.optimizer
        self._gradient: dict[int, Tensor] = {}
        self._trusted = False  # whether a step was seen to be taken with X-SAM's gradient
        self._find_parts()

    def begin(self) -> None:
        """Begin an optimizer step: look up where the engine has its weights, and drop what gradients it has."""
        self._find_parts()
        self.drop_gradient()

    def _find_parts(self) -> None:
        homes = self._homes()
        parameters = trainable_parameters(self.engine.module)
        self._home = {name: homes[parameter] for name, parameter in parameters.items()}
        self.parts = {name: Part.of(home.piece, home.place) for name, home in self._home.items()}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Have the engine take no step within backward passes of the block."""
        with replaced(self.engine, "step", lambda *args, **kwargs: None):
            yield

    def take_gradient(self) -> None:
        """Read the gradient of the last passes, averaged over the processes, into `.grad` of the parts."""
        averaged = self.optimizer.averaged_gradients
        # A copy, for stage 3 writes each pass's gradient into the same memory.
        self._hold({i: torch.cat([x.flatten() for x in averaged[i]]).float() for i in averaged if averaged[i]})

    def drop_gradient(self) -> None:
        """Leave no gradient, neither in the engine nor in `.grad` of the parts."""
        self._hold({})
        self._clear()

    @contextmanager
    def gradient_set_aside(self) -> Iterator[None]:
        """Give the block no gradient, and put back after it the one that there was."""
        gradient = self._gradient
        self.drop_gradient()
        try:
            yield
        finally:
            self.drop_gradient()
            self._hold(gradient)

    def step(self) -> None:
        """Have the engine step with `.grad` of the parts, or not at all without one.

        Raises:
            RuntimeError: where the first step is taken with another gradient.
        """
        if self._gradient:
            for i, flat in self._gradient.items():
                self.optimizer.averaged_gradients[i] = [flat]
            with nullcontext() if self._trusted else self._distrusted():
                self.engine.step()
            self._trusted = True
        self.drop_gradient()

    def perturbed(
        self, weights: Sequence[Tensor], perturbation: Sequence[Tensor]
    ) -> AbstractContextManager[Tensor | None]:
        """Hold the weights, of which each process has given its parts, at w + perturbation on all processes."""
        raise NotImplementedError

    def _homes(self) -> dict[nn.Parameter, Home]:
        raise NotImplementedError

    def _clear(self) -> None:
        raise NotImplementedError

    def _masters(self) -> list[Tensor]:
        """Return this process's master weights, a tensor a group: what the optimizer steps on."""
        raise NotImplementedError

    def _hold(self, gradient: dict[int, Tensor]) -> None:
        self._gradient = gradient
        for name, part in self.parts.items():
            home, part.grad = self._home[name], None
            if home.group in gradient:
                piece = gradient[home.group].narrow(0, home.offset, len(part))
                part.grad = Part.of(piece, home.place)

    @contextmanager
    def _distrusted(self) -> Iterator[None]:
        """Compare the gradient that the optimizer gets within the block with that of the parts."""
        clipping = self.engine.gradient_clipping()
        length = norm([part.grad for part in self.parts.values() if part.grad is not None]).item()
        factor = min(1.0, clipping / (length + 1e-6)) if clipping > 0 else 1.0
        left = {i: checksum(flat) * factor for i, flat in self._gradient.items()}
        masters = {id(master): i for i, master in enumerate(self._masters())}
        stepped = {}

        def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                for master in group["params"]:
                    if master.grad is not None:
                        stepped[masters.get(id(master))] = checksum(master.grad.flatten())

        hook = self.optimizer.optimizer.register_step_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()
        agrees = stepped.keys() == left.keys() and all(
            bool(((stepped[i] - left[i]).abs() <= TOLERANCE * left[i][0]).all()) for i in left
        )
        if not agrees:
            raise RuntimeError(
                f"DeepSpeed stepped with another gradient than the one that X-SAM left ({describe(self.engine)}): this "
                "configuration changes it on the way. Use one that docs/distributed.md names as tested, such as "
                "recipes/accelerate/zero2.yaml, and report this one."
            )


def checksum(flat: Tensor) -> Tensor:
    """Return the norm and 7 sums, of every seventh element each, by which two vectors are seen to differ."""
    wide = flat.double()
    return torch.stack([wide.norm(), *(wide[start::7].sum() for start in range(7))])


class ReplicatedWeights(Engine):
    """ZeRO-1 and 2: every process has the weights, in a flat tensor a group, and steps on its part of each."""

    @contextmanager
    def perturbed(self, weights: Sequence[Tensor], perturbation: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """See [`Engine.perturbed`]."""
        flat = self.optimizer.bit16_groups_flat
        backup = torch._foreach_mul(flat, 1.0)
        try:
            with perturbed(weights, perturbation) as realised:
                self._gather()
                yield realised
        finally:
            torch._foreach_copy_(flat, backup)  # not gathered, for another process may have failed

    def _gather(self) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self.optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )

    def _homes(self) -> dict[nn.Parameter, Home]:
        homes = {}
        for group, (flat, parameters) in enumerate(
            zip(self.optimizer.bit16_groups_flat, self.optimizer.bit16_groups, strict=True)
        ):
            size = flat.numel() // torch.distributed.get_world_size()
            ours = torch.distributed.get_rank() * size
            for parameter in parameters:
                start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                first = max(start, ours)
                count = max(0, min(start + parameter.numel(), ours + size) - first)
                first = first if count else start
                place = Place(parameter.shape, first - start)
                offset = first - ours if count else 0
                homes[parameter] = Home(flat.narrow(0, first, count), place, group, offset)
        return homes

    def _clear(self) -> None:
        for gradients in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        self.optimizer.zero_grad()

    def _masters(self) -> list[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups


class PartitionedWeights(Engine):
    """ZeRO-3: every process has its part of each parameter, and gathers the whole for its passes."""

    @contextmanager
    def perturbed(self, weights: Sequence[Tensor], perturbation: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """See [`Engine.perturbed`]."""
        try:
            with perturbed(weights, perturbation) as realised:
                self._release()
                yield realised
        finally:
            self._release()

    def _release(self) -> None:
        """Let go of parameters that are gathered, small ones that stay so among them: they are of other weights."""
        self.optimizer.parameter_offload.partition_all_parameters()

    def _homes(self) -> dict[nn.Parameter, Home]:
        homes, rank = {}, torch.distributed.get_rank()
        for group, parameters in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()  # the last ones are padded
                count = max(0, min(size, parameter.ds_numel - rank * size))
                place = Place(parameter.ds_shape, rank * size if count else 0)
                homes[parameter] = Home(parameter.ds_tensor.flatten()[:count], place, group, offset)
                offset += size
        return homes

    def _clear(self) -> None:
        # A parameter that a pass does not reach would keep the gradient of an earlier one.
        self.optimizer.grad_partitions_flat_buffer.zero_()
        self.optimizer.averaged_gradients.clear()
        self.optimizer.zero_grad()

    def _masters(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat


def engine_of(accelerator: Accelerator) -> Engine | None:
    """Return the DeepSpeed engine that the accelerator has prepared, or None."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None:
        return None
    kind = PartitionedWeights if wrapped.engine.zero_optimization_stage() == 3 else ReplicatedWeights
    return kind(wrapped.engine)

"""The curvature of a training loss under Accelerate: Hessian-vector products, and the top eigenpair."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..functional.hessian_vector_products import (
    HessianVectorProduct,
    Perturb,
    exact_hessian_vector_product,
    finite_difference_hessian_vector_product,
    finite_difference_step,
)
from ..functional.perturbation import perturbed
from ..functional.power_iteration import Eigenpair, Spectrum, power_iteration, random_unit_vector
from ..functional.tensors import is_sharded, multiply
from .deepspeed_refusals import refuse_measuring
from .double_backward import Method, choose_method, obstacle_in_arguments
from .gradients import gradients_set_aside
from .loss import Loss, mean_loss
from .modes import evaluating, forward_passes_evaluated, reshard, twice_differentiable_attention
from .precision import coarsest_dtype, loss_scale
from .processes import holds_everywhere, mean_over_processes
from .refusals import first_line
from .scope import others_frozen, parameters_in_scope
from .side_effects import Surroundings, copied, logs_dropped

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


class ExactProductError(RuntimeError):
    """An exact Hessian-vector product cannot be computed."""


class Curvature:
    """The Hessian of the unscaled mean over the processes of a loss, at the weights as they stand.

    Args:
        accelerator: the trainer's.
        model: whose loss it is, without wrappers.
        parameters: what the Hessian is taken with respect to.
        loss: L, the same number of terms on each process.
        hvp: how products are computed, see `XSAMConfig.hvp`.
        obstacle: to exact products, where one is known without trying.
        method: what `hvp` came to earlier in the same training; None chooses at the first product.
        perturb: moves the weights for a finite difference, as [`~hf_xsam.functional.perturbation.perturbed`] does.

    Attributes:
        method: "exact" or "finite_difference", None until it is chosen.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        parameters: Sequence[Tensor],
        loss: Loss,
        hvp: str = "auto",
        obstacle: str | None = None,
        method: Method | None = None,
        perturb: Perturb = perturbed,
    ) -> None:
        self.accelerator, self.model, self.parameters, self.loss = accelerator, model, parameters, loss
        self.method = method
        self._perturb = perturb
        self._hvp, self._obstacle = hvp, obstacle

    @contextmanager
    def hessian(self, gradient: Sequence[Tensor] | None = None) -> Iterator[HessianVectorProduct]:
        """Yield v -> H v, to be used within the block.

        Args:
            gradient: what `loss.gradient(parameters)` gives at the weights as they stand, where it is known already.

        Raises:
            RuntimeError: where hvp is "exact" and the model has no second derivative.
        """
        if self.method is None:
            self.choose_method(gradient)
        exact = self.method == "exact"
        with self._exact_products() if exact else self._finite_differences(gradient) as scaled:
            reduce = self.accelerator.num_processes > 1 and (exact or self.loss.gradient_is_local)

            def product(vector: Sequence[Tensor]) -> list[Tensor]:
                result = self._exact(scaled, vector) if exact else scaled(vector)
                if self.accelerator.scaler is not None:
                    multiply(result, 1 / loss_scale(self.accelerator))
                return mean_over_processes(self.accelerator, result) if reduce else result

            yield product

    def choose_method(self, gradient: Sequence[Tensor] | None = None) -> Method:
        """Choose how products are computed; `gradient` is what `loss.gradient(parameters)` gives, if it is known."""
        self.method = choose_method(
            self.accelerator, self._hvp, self.loss, self.parameters, self.model, self._obstacle, gradient
        )
        return self.method

    def _exact(self, product: HessianVectorProduct, vector: Sequence[Tensor]) -> list[Tensor]:
        """Return H v where all processes can compute it, for all of them have to go on the same way."""
        result, error = None, None
        try:
            result = product(vector)
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # of the user's code too, which may take another path in evaluation mode
            error = raised
        if not holds_everywhere(self.accelerator, error is None) or result is None:
            reason = "another process's failed" if error is None else first_line(error).rstrip(".")
            raise ExactProductError(f"an exact Hessian-vector product failed ({reason})") from error
        return result

    @contextmanager
    def _exact_products(self) -> Iterator[HessianVectorProduct]:
        # Attention's kernel is chosen again in the backward pass, where gradient checkpointing computes it anew.
        with (
            others_frozen(self.model, self.parameters),
            forward_passes_evaluated(self.model),
            twice_differentiable_attention(),
        ):
            yield exact_hessian_vector_product(self.loss.terms, self.parameters, keep_graph=self.loss.single_term)

    @contextmanager
    def _finite_differences(self, gradient: Sequence[Tensor] | None) -> Iterator[HessianVectorProduct]:
        # Nothing is frozen: DDP and FSDP wait for all gradients.
        known = self.loss.gradient(self.parameters) if gradient is None else gradient
        step = finite_difference_step(self.parameters, coarsest_dtype(self.accelerator, self.model))
        gradient_here = partial(self.loss.gradient, self.parameters)
        yield finite_difference_hessian_vector_product(gradient_here, self.parameters, known, step, self._perturb)

    def top_eigenpair(
        self,
        start: Sequence[Tensor],
        iterations: int,
        spectrum: Spectrum | None = None,
        momentum: float = 0.0,
        gradient: Sequence[Tensor] | None = None,
    ) -> Eigenpair:
        """Return what power iteration finds from `start`: see [`hf_xsam.functional.power_iteration`].

        If "auto" has chosen exact products and one fails, because a later batch takes other operations, the kind of
        product is chosen again.
        """
        try:
            with self.hessian(gradient) as product:
                return power_iteration(product, start, iterations, spectrum, momentum)
        except ExactProductError as error:
            if self._hvp != "exact":
                self.choose_method(gradient)
            if self.method == "exact":
                cause = error.__cause__ or error
                if not isinstance(cause, RuntimeError):  # of the model's own code, not of its derivatives
                    raise cause from None
                raise RuntimeError(f"hvp is {self._hvp!r}, but {error}. Use hvp='finite_difference'.") from cause
            logger.warning("X-SAM goes on with finite differences: %s.", error)
            return self.top_eigenpair(start, iterations, spectrum, momentum, gradient)


class TopEigenpair(NamedTuple):
    """What [`top_eigenpair`] found.

    Attributes:
        eigenvector: v by parameter name, jointly of norm 1, in float32 or wider.
        eigenvalue: lambda = <v, H v>.
        residual: norm(H v - lambda v) / abs(lambda), how far the iterations are from an eigenpair. It bounds the
            eigenvalue's relative distance to the nearest one of H. Eigenvalue and residual are those of v before the
            last iteration.
    """

    eigenvector: dict[str, Tensor]
    eigenvalue: float
    residual: float


def top_eigenpair(
    trainer: "Trainer",
    batches: Sequence[Mapping[str, Any]],
    iterations: int = 20,
    eigen_scope: str = "trainable",
    hvp: str = "auto",
) -> TopEigenpair:
    """Estimate the top eigenpair of the Hessian of any trainer's mean loss over `batches`, in evaluation mode.

    Args:
        trainer ([`~transformers.Trainer`]): whose loss, model and precision it takes; FSDP2 works too.
        batches: collated batches, of one size for a plain mean; an iteration takes a Hessian-vector product of
            each. With several processes, each brings its own.
        iterations: power iterations, from a random start, at least 1.
        eigen_scope: what the Hessian spans: values as for `XSAMConfig.eigen_scope`.
        hvp: how Hessian-vector products are computed: values as for `XSAMConfig.hvp`.

    Returns:
        Eigenvector, eigenvalue and residual. A residual that is not small asks for more iterations.

    Raises:
        ValueError: without batches or iterations, or under DeepSpeed.
    """
    if isinstance(batches, Mapping) or not batches:
        raise ValueError(f"batches is {type(batches).__name__} of {len(batches)}; it must be a list of batches.")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1.")
    accelerator, device = trainer.accelerator, trainer.args.device
    refuse_measuring(trainer)
    model = accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    reshard(model)
    scope = parameters_in_scope(model, eigen_scope, "eigen_scope")
    parameters = list(scope.values())

    def loss_on(batch: Mapping[str, Any]) -> Tensor:
        before.restore()  # a batch's loss depends on the weights alone
        loss = trainer.compute_loss(model, send_to_device(copied(batch), device))
        assert isinstance(loss, Tensor)  # a tuple only with return_outputs
        return loss

    with (
        evaluating(model),
        logs_dropped(trainer),
        Surroundings(model, device, trainer).undone() as before,
        gradients_set_aside(model),
    ):
        losses = [partial(loss_on, batch) for batch in batches]
        loss = mean_loss(accelerator, model, losses, sharded=is_sharded(parameters[0]))
        curvature = Curvature(accelerator, model, parameters, loss, hvp, obstacle_in_arguments(trainer.args))
        estimate = curvature.top_eigenpair(random_unit_vector(parameters, trainer.args.seed), iterations)
    eigenvector = dict(zip(scope, estimate.vector, strict=True))
    return TopEigenpair(eigenvector, estimate.value.item(), estimate.residual.item())

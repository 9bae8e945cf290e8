"""X-SAM's optimizer steps: each replaces the gradient that the Trainer has accumulated by a sharpness-aware one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from ..config import XSAMConfig
from ..functional.correction import correction_factors
from ..functional.hessian_vector_products import central_difference
from ..functional.perturbation import ascent_perturbation, perturbed
from ..functional.power_iteration import first_vector, power_iteration
from ..functional.tensors import dot, is_sharded, multiply, norm, set_to_combination
from ..state import XSAMState
from .curvature import Curvature
from .deepspeed import engine_of
from .deepspeed_window import EngineWindow
from .double_backward import Method, obstacle_in_arguments
from .echo import check_echo, marks_of
from .gradients import gradient_norm, gradients, with_gradient
from .logs import RunningMeans, alignment
from .modes import reshard
from .one_pass import OnePass
from .precision import loss_scale
from .processes import all_finite, holds_everywhere
from .refusals import refuse_gradients_left, refuse_optimizer_in_hooks
from .replay import StepAgain, Window
from .scope import parameters_in_scope, trainable_parameters
from .side_effects import Surroundings

Parameters = Mapping[str, Tensor]  # or this process's parts of them


class SharpnessAwareSteps:
    """The optimizer steps of one training, and what is found out along it.

    Args:
        config: X-SAM's settings.
        state: what a checkpoint carries; each step changes it.
        accelerator: the trainer's.
        model: without wrappers.
        args: the trainer's.
        rows_are_examples: see [`~hf_xsam.XSAMTrainerMixin`].

    Attributes:
        window: what is gathered of the optimizer step under way.
        metrics: of the steps since the last log.
        method: how Hessian-vector products are computed, chosen at the first one, which shows what the model allows.
    """

    def __init__(
        self,
        config: XSAMConfig,
        state: XSAMState,
        accelerator: Accelerator,
        model: nn.Module,
        args: TrainingArguments,
        rows_are_examples: bool,
    ) -> None:
        self.config, self.state, self.accelerator, self.model, self.args = config, state, accelerator, model, args
        self.window: Window | None = None
        self.metrics = RunningMeans()
        self.method: Method | None = None
        self._one_pass = OnePass(config, state, args.seed)
        self._engine = engine_of(accelerator)  # DeepSpeed's, which holds the gradients
        self._rows_are_examples = rows_are_examples
        self._rows_add_up: bool | None = None  # whether the losses of a batch's rows do; found out at the first product
        self._checked = False  # whether a step run again was seen to be the same
        self._surroundings: Surroundings | None = None  # found at the first step whose micro-batches are kept
        self._realised: Tensor | None = None  # of the last perturbation in one pass

    def begin_window(self, model: nn.Module, training_step: StepAgain, trainer: Any, step: int) -> Window:
        """Begin optimizer step `step`; its micro-batches are kept if they will be run again.

        Args:
            model: as prepared by the accelerator.
            training_step: runs a micro-batch again.
            trainer: whose attributes the steps may change.
            step: counted from the first step that is X-SAM's.
        """
        trainable = trainable_parameters(self.model)
        if self._engine is None:
            refuse_gradients_left(trainable)
        check_is_due = {"first": not self._checked, "every": True, "never": False}[self.config.replay_check]
        refresh_is_due = self.config.refreshes_at(step, self.state.refreshed_at)
        surroundings, marks = None, None
        if check_is_due or refresh_is_due or not self.config.takes_one_pass:
            surroundings = self._find_surroundings(trainer, trainable.values())
            marks = marks_of(surroundings) if check_is_due else None
        kept = (training_step, self.accelerator, model, surroundings, marks)
        self.window = Window(*kept) if self._engine is None else EngineWindow(*kept, engine=self._engine)
        return self.window

    def replace_gradient(self, window: Window, step: int) -> None:
        """Replace the window's gradient in `.grad` by X-SAM's, the corrected gradient d."""
        window.end()
        trainable = self._trainable()
        if self._nothing_learnt(window, trainable):
            self.state.skipped_steps += 1
            return
        self._check_replay(window, trainable, step)
        refreshed = self._refresh_eigenvector(window, trainable, step)
        metrics = self._gradient_at_perturbed_weights(window, trainable, step)
        if self._is_usable(metrics, refreshed):
            self.metrics.add(metrics | self._correct(trainable, metrics["perturbed_gradient_norm"], step))
        else:
            window.leave_harmless_gradient(list(trainable.values()))
            self.state.skipped_steps += 1

    @contextmanager
    def perturbed_in_one_pass(self, step: int, side: int = 1) -> Iterator[None]:
        """Hold the weights at w + side * eps within the block, if steps take one pass; eps is that of [`OnePass`].

        Without a v yet, the weights stay at w.
        """
        if not self._one_pass.moves_at(step):
            yield
            return
        reshard(self.model)
        scope = self._parameters_in(self._one_pass.scope)
        watched = scope if self._engine is None else {}  # DeepSpeed's parts come and go
        # No name holds eps, whose memory is free again once the weights have moved.
        with (
            self._perturbed(list(scope.values()), self._one_pass.perturbation(scope, step, side)) as self._realised,
            self._one_pass.movement_refused(watched),
        ):
            yield

    def abandon(self) -> None:
        """Give up the optimizer step under way, after an exception: leave no gradient."""
        self.window = None
        self.model.zero_grad()
        if self._engine is not None:
            self._engine.drop_gradient()

    def forget(self) -> None:
        """Let go of the trainer that the steps were of."""
        self.window = self._surroundings = None

    def _find_surroundings(self, trainer: Any, trainable: Iterable[nn.Parameter]) -> Surroundings:
        """Return what the steps change beside gradients, found anew where parameters were frozen or unfrozen."""
        known = self._surroundings
        if known is not None and known.is_of(trainable):
            return known
        self._surroundings = Surroundings(self.model, self.args.device, trainer)
        self._surroundings.warned = known is not None and known.warned
        return self._surroundings

    @property
    def _synchronizes(self) -> bool:
        return self.config.ascent != "local"

    def _nothing_learnt(self, window: Window, trainable: Parameters) -> bool:
        """Return whether the window left no gradient: a training step may skip a batch, or its loss need no weight."""
        if window.marks is not None:
            refuse_optimizer_in_hooks(trainable)
        nothing = not with_gradient(trainable)
        # The gradient is that of all processes, or each has its own.
        return nothing if self._synchronizes else holds_everywhere(self.accelerator, nothing)

    def _check_replay(self, window: Window, trainable: Parameters, step: int) -> None:
        """Where it is due, warn if the window gives another loss or gradient at the same weights."""
        if window.marks is not None:
            with self.perturbed_in_one_pass(step):
                self._checked = check_echo(window, list(trainable.values()), self._synchronizes, window.marks)

    def _refresh_eigenvector(self, window: Window, trainable: Parameters, step: int) -> bool:
        """Where it is due, run power iterations on the window's loss at w, from the last eigenvector.

        Returns:
            False where something was not finite: the state is left as it was, and the next step tries again.
        """
        config, state = self.config, self.state
        if not config.refreshes_at(step, state.refreshed_at):
            return True
        scope = self._parameters_in("eigen_scope")
        parameters = list(scope.values())
        gradient = gradients(parameters)
        if not all_finite(self.accelerator, [norm(gradient)]):
            return False
        start = state.warm_start(scope) or self._first_vector(gradient)
        curvature, momentum = self._curvature(window, parameters, gradient), config.eigen_momentum
        elsewhere = self._one_pass.moves_at(step)  # so that `.grad` is not of w
        if elsewhere and self.method == "finite_difference":
            product = self._product_from_both_sides(window, trainable, parameters, step)
            estimate = power_iteration(lambda _: product, start, 1, state.spectrum, momentum)
        else:
            with window.gradients_set_aside():
                known = None if elsewhere else gradient
                estimate = curvature.top_eigenpair(start, config.power_iterations, state.spectrum, momentum, known)
            self.method = curvature.method
        if estimate.is_finite():
            state.take(estimate, scope, step)
            return True
        return False

    def _curvature(self, window: Window, parameters: Sequence[Tensor], gradient: Sequence[Tensor]) -> Curvature:
        config = self.config
        rows_are_examples = self._rows_are_examples
        splits = rows_are_examples and config.eigen_batch_fraction < 1 and config.hvp != "finite_difference"
        if splits and self.method != "finite_difference" and not any(map(is_sharded, parameters)):
            if self._rows_add_up is None:  # else each row may have a loss that is no part of the batch's
                self._rows_add_up = window.rows_add_up()
            rows_are_examples = self._rows_add_up
        loss = window.loss_of_part(config.eigen_batch_fraction, rows_are_examples, self._synchronizes)
        obstacle = obstacle_in_arguments(self.args)
        curvature = Curvature(
            self.accelerator, self.model, parameters, loss, config.hvp, obstacle, self.method, self._perturbed
        )
        if self.method is None:
            with window.gradients_set_aside():
                self.method = curvature.choose_method(gradient)
        return curvature

    def _product_from_both_sides(
        self, window: Window, trainable: Parameters, parameters: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        """Return H v = (g(w + eps) - g(w - eps)) / (2 s rho), eps = s * rho * v, from one more pass, at w - eps.

        It leaves the mean of the two gradients, which is closer to that of L + rho^2 / 2 * lambda than either.

        Args:
            window: whose gradient at w + eps is in `.grad`.
            trainable: parameters by name.
            parameters: those that H is taken with respect to.
            step: X-SAM's.
        """
        there = gradients(parameters)
        with window.gradients_set_aside():
            with self.perturbed_in_one_pass(step, side=-1):
                window.run()
            here = gradients(parameters)
            others = {name: parameter.grad for name, parameter in trainable.items()}
        product = central_difference(there, here, 2 * self.config.signed_rho_at(step))
        multiply(product, 1 / loss_scale(self.accelerator))
        for name, parameter in trainable.items():
            other = others[name]
            if parameter.grad is not None and other is not None:
                parameter.grad.add_(other).mul_(0.5)
        return product

    def _first_vector(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        if not self._synchronizes:
            gradient = self.accelerator.reduce(gradient, reduction="mean")
        return first_vector(gradient, self.args.seed)

    def _gradient_at_perturbed_weights(self, window: Window, trainable: Parameters, step: int) -> dict[str, Tensor]:
        """Put the gradient a at w + eps in place of g in `.grad`; return what is known of both passes.

        In one pass, `.grad` holds a already.
        """
        config, scaled = self.config, loss_scale(self.accelerator)
        rho = config.rho_at(step)
        if config.takes_one_pass:
            metrics, realised = {}, self._realised
            if config.perturbation == "eigenvector" and self.state.spectrum is not None:
                eigenvalue = self.state.spectrum.eigenvalue
                metrics = {"rayleigh_quotient": eigenvalue, "sharpness": rho**2 / 2 * eigenvalue}
        else:
            metrics = {"gradient_norm": gradient_norm(trainable) / scaled}
            weights = list(self._parameters_in("perturb_scope").values())
            # No name holds eps, whose memory is free again once the weights have moved.
            with self._perturbed(
                weights, ascent_perturbation(weights, gradients(weights), rho, config.adaptive)
            ) as realised:
                metrics["perturbed_loss"] = window.run()
            metrics["sharpness"] = metrics["perturbed_loss"] - window.loss
        if realised is not None and rho > 0:
            metrics["realised_perturbation"] = realised
        return metrics | {"perturbed_gradient_norm": gradient_norm(trainable) / scaled}

    def _is_usable(self, metrics: Mapping[str, Tensor], refreshed: bool) -> bool:
        """Return whether the passes were finite, on all processes, and with a GradScaler the refresh too."""
        scaler_skips = not refreshed and self.accelerator.scaler is not None
        return not scaler_skips and all_finite(self.accelerator, metrics.values())

    def _correct(self, trainable: Parameters, length: Tensor, step: int) -> dict[str, Tensor]:
        """Put d in place of a in `.grad`, where v is known; `length` is norm(a). Return what is known of v."""
        config, state = self.config, self.state
        if not config.corrects_at(step) or state.spectrum is None:
            return {}
        # What the second pass did not reach stays without a gradient, as it would in the stock Trainer.
        parameters = with_gradient(trainable)
        gradient, eigenvector = gradients(list(parameters.values())), state.eigenvector_over(parameters)
        scaled = loss_scale(self.accelerator)  # as the gradient is, and the optimizer's unscaling takes from d
        along = dot(gradient, eigenvector) / scaled
        size, change = correction_factors(length, along, config.alpha, config.correction, config.normalize_gradient)
        set_to_combination(gradient, size, eigenvector, scaled * change)
        return {"rayleigh_quotient": state.spectrum.eigenvalue, **alignment(along, length)}

    def _trainable(self) -> Parameters:
        return trainable_parameters(self.model) if self._engine is None else self._engine.parts

    def _parameters_in(self, field: str) -> Parameters:
        scope = parameters_in_scope(self.model, getattr(self.config, field), f"XSAMConfig.{field}")
        return scope if self._engine is None else {name: self._engine.parts[name] for name in scope}

    def _perturbed(self, weights: Sequence[Tensor], eps: Sequence[Tensor]) -> AbstractContextManager[Tensor | None]:
        return perturbed(weights, eps) if self._engine is None else self._engine.perturbed(weights, eps)

"""The perturbation of steps of one pass: along the top eigenvector or a random direction, both sides in turn."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import XSAMConfig
from ..functional.power_iteration import random_unit_vector
from ..functional.tensors import scale
from ..state import XSAMState
from .moving_weights import WATCHED_STEPS, changed, sums

SEEDS_APART = 10**9  # of the random directions of two trainings


class OnePass:
    """Where the one pass of a step is taken, if there is one.

    Args:
        config: X-SAM's settings.
        state: whose eigenvector it is.
        seed: of the training, for random directions.

    Attributes:
        scope: the setting that says what moves.
    """

    def __init__(self, config: XSAMConfig, state: XSAMState, seed: int) -> None:
        self.config, self.state, self.seed = config, state, seed
        self._is_random = config.perturbation == "random"
        self.scope = "perturb_scope" if self._is_random else "eigen_scope"
        self._drawn_for: tuple[int, ...] = ()  # the number of the random direction, and the parameters that it spans
        self._drawn = list[Tensor]()
        self._watched = 0  # passes that were seen to leave the perturbed weights as they were

    def moves_at(self, step: int) -> bool:
        """Return whether the pass of `step` is taken at other weights: not at rho 0, nor without a v yet."""
        known = self._is_random or self.state.eigenvalue is not None
        return self.config.takes_one_pass and known and self.config.rho_at(step) > 0

    def perturbation(self, parameters: Mapping[str, Tensor], step: int, side: int = 1) -> list[Tensor]:
        """Return side * eps of the parameters in the scope: eps = s * rho * v, or s * rho * u."""
        direction = self._direction(parameters, step) if self._is_random else self.state.warm_start(parameters)
        assert direction is not None  # else nothing moves
        signed_rho = side * self.config.signed_rho_at(step)
        return scale(torch.tensor(signed_rho, dtype=direction[0].real.dtype, device=direction[0].device), direction)

    @contextmanager
    def movement_refused(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Watch the first passes at perturbed weights: where they move them too, putting them back would undo that.

        Raises:
            ValueError: if one does; the message names a weight.
        """
        if self._watched == WATCHED_STEPS:
            yield
            return
        before = sums(weights.values())
        yield
        if moved := changed(before, sums(weights.values())):
            raise ValueError(
                f"XSAMConfig.perturbation is {self.config.perturbation!r}, but the model's forward pass itself changes "
                f"trainable weights, such as {list(weights)[moved[0]]!r}, which one pass cannot keep. Use "
                "perturbation='gradient', or change the weights in a callback's on_step_end."
            )
        self._watched += 1

    def _direction(self, parameters: Mapping[str, Tensor], step: int) -> list[Tensor]:
        """Return u, of norm 1, held for `eigen_interval` steps; seed and step decide it alone, on all processes."""
        draw = step // self.config.eigen_interval
        drawn_for = draw, *map(id, parameters.values())
        if drawn_for != self._drawn_for:
            self._drawn.clear()  # before the next one takes memory
            self._drawn += random_unit_vector(list(parameters.values()), self.seed * SEEDS_APART + draw)
            self._drawn_for = drawn_for
        return self._drawn

"""The perturbation of steps of one pass: along the top eigenvector or a random direction, both sides in turn."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import XSAMConfig
from ..functional.power_iteration import random_unit_vector
from ..functional.tensors import scale
from ..state import XSAMState

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
        self._draw, self._drawn = -1, list[Tensor]()  # the random direction's number, and the direction

    def moves_at(self, step: int) -> bool:
        """Return whether the pass of `step` is taken at other weights: not at rho 0, nor without a v yet."""
        known = self._is_random or self.state.eigenvalue is not None
        return self.config.takes_one_pass and known and self.config.rho_at(step) > 0

    def perturbation(self, parameters: Mapping[str, Tensor], step: int, side: int = 1) -> list[Tensor]:
        """Return side * s * rho * v, or rho * u in place of rho * v, of the parameters in the scope."""
        direction = self._direction(parameters, step) if self._is_random else self.state.eigenvector_over(parameters)
        signed_rho = side * self.config.signed_rho_at(step)
        return scale(torch.tensor(signed_rho, dtype=direction[0].real.dtype, device=direction[0].device), direction)

    def _direction(self, parameters: Mapping[str, Tensor], step: int) -> list[Tensor]:
        """Return u, of norm 1, held for `eigen_interval` steps; seed and step decide it alone, on all processes."""
        draw = step // self.config.eigen_interval
        if draw != self._draw:
            self._drawn.clear()  # before the next one takes memory
            self._drawn += random_unit_vector(list(parameters.values()), self.seed * SEEDS_APART + draw)
            self._draw = draw
        return self._drawn

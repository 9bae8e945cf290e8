"""The modes: what each sets of X-SAM, and the controls whose v is a random direction instead of the top eigenvector."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_xsam import XSAMTrainer
from hf_xsam.functional.power_iteration import Eigenpair, Spectrum, random_unit_vector
from hf_xsam.functional.tensors import wide_dtype
from hf_xsam.step.replay import Window
from hf_xsam.step.sharpness_aware import Parameters, SharpnessAwareSteps


@dataclass(frozen=True)
class Mode:
    """What a mode changes.

    Attributes:
        xsam: fields of `XSAMConfig`; None for the stock Trainer.
        random: whether v is a random direction, a new one at each refresh.
        rho_factor: what the task's radii are multiplied by, which are SAM's.
    """

    xsam: Mapping[str, Any] | None = field(default_factory=dict)
    random: bool = False
    rho_factor: float = 1.0


# The corrections keep the gradient's norm, so that they differ from SAM along v alone; "paper" is Eq. 11 as published,
# which sets the norm to about 1.
PAPER = {"correction": "paper", "alpha": 0.2, "normalize_gradient": True}
PROJECTION = {"correction": "projection", "alpha": 0.2, "normalize_gradient": False}
SAM = {"alpha": 0.0}
ONE_PASS = {"perturbation": "eigenvector", "alpha": 0.0, "eigen_warmup_steps": 0}
ALONG_V = 5.0  # the best rho along v was about 5 times SAM's
ALONG_RANDOM = 40.0  # and along a random direction far larger
FROM_BOTH_SIDES = 3.5  # and smaller where each refresh is a difference between both sides
LATE = (0.5, 0.7, 0.9)  # shares of all steps that are the stock Trainer's

MODES: dict[str, Mode] = {
    "stock": Mode(None),
    "sam": Mode(SAM),
    "paper": Mode(PAPER),
    "paper_norm_kept": Mode({**PAPER, "normalize_gradient": False}),
    "projection": Mode(PROJECTION),
    **{
        f"aligned_{alpha:g}": Mode({"correction": "aligned", "alpha": alpha, "normalize_gradient": False})
        for alpha in (0.5, 1.0, 2.0)
    },
    "one_pass": Mode(ONE_PASS, rho_factor=ALONG_V),
    "one_pass_differences": Mode({**ONE_PASS, "hvp": "finite_difference"}, rho_factor=FROM_BOTH_SIDES),
    **{f"sam_late_{start}": Mode({**SAM, "start_step": start}) for start in LATE},
    **{f"one_pass_late_{start}": Mode({**ONE_PASS, "start_step": start}, rho_factor=ALONG_V) for start in LATE},
    "paper_random": Mode(PAPER, random=True),
    "projection_random": Mode(PROJECTION, random=True),
    "one_pass_random": Mode({**ONE_PASS, "perturbation": "random"}, rho_factor=ALONG_RANDOM),
}
# What the pages call them, where only these are shown.
LABELS = {
    "stock": "stock Trainer",
    "stock_long": "stock Trainer, in X-SAM's time",
    "sam": "SAM",
    "one_pass": "one pass",
    "one_pass_differences": "one pass, by differences",
    "one_pass_random": "one pass, random direction",
    "paper": "X-SAM",
}
LONG = "_long"  # "stock_long", "sam_long": as many steps of that mode as cost what X-SAM's run costs
ALL_MODES = [*MODES, "stock" + LONG, "sam" + LONG]


class RandomDirectionSteps(SharpnessAwareSteps):
    """Steps whose v is a random direction, drawn anew from the seed and the step where v would be refreshed."""

    def _refresh_eigenvector(self, window: Window, trainable: Parameters, step: int) -> bool:
        if self.config.refreshes_at(step, self.state.refreshed_at):
            scope = self._parameters_in("eigen_scope")
            parameters = list(scope.values())
            vector = random_unit_vector(parameters, self.args.seed * 1_000_000 + step)
            zero = torch.zeros((), dtype=wide_dtype(parameters[0]), device=parameters[0].device)
            self.state.take(Eigenpair(vector, zero, Spectrum.unknown(zero), zero), scope, step)
        return True


class RandomDirectionTrainer(XSAMTrainer):
    """An `XSAMTrainer` of such steps."""

    def _begin_steps(self, kind: type[SharpnessAwareSteps] = RandomDirectionSteps) -> SharpnessAwareSteps:
        return super()._begin_steps(kind)

"""What X-SAM logs: means over steps, and warnings when they tell of a setting that does not fit."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import XSAMConfig
from ..functional.tensors import reciprocal_or_zero

logger = logging.getLogger(__name__)

# What is logged unless all is asked for.
SKIPPED_STEPS = "xsam/skipped_steps"
SUMMARY = ("xsam/active", "xsam/rayleigh_quotient", "xsam/angle_degrees", "xsam/sharpness")
# How metrics end that an evaluation logs beside its results: the Trainer's, and TRL's.
NOT_RESULTS = ("runtime", "per_second", "preparation_time", "num_tokens")
# When the perturbed loss counts as far above the loss, and over how many optimizer steps before a warning.
LARGE_SHARPNESS = 0.5
PATIENCE = 20
# How far the weights' movement may be from rho before a warning.
ROUNDING_TOLERANCE = 0.1


def alignment(along: Tensor, length: Tensor) -> dict[str, Tensor]:
    """Return the cosine <a, v> / norm(a) between gradient and eigenvector, and its angle in degrees, 0 to 180.

    Args:
        along: <a, v>, 0-dimensional.
        length: norm(a), 0-dimensional.
    """
    cosine = along * reciprocal_or_zero(length)
    return {"cosine": cosine, "angle_degrees": torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))}


def chosen_metrics(metrics: Mapping[str, float], which: str) -> dict[str, float]:
    """Return what of X-SAM's metrics is logged: all, or the `SUMMARY` and how many steps were skipped, if any."""
    if which == "all":
        return dict(metrics)
    return {name: value for name, value in metrics.items() if name in SUMMARY or (name == SKIPPED_STEPS and value)}


@dataclass
class RunningMeans:
    """Means of metrics over the optimizer steps since they were last taken, kept on the device until then."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count in one step's values, each 0-dimensional."""
        for name, value in metrics.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    @property
    def steps(self) -> int:
        """Return over how many steps the means are."""
        return max(self.counts.values(), default=0)

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over the steps and the processes, and start over."""
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names]) if names else torch.zeros(0)
        self.sums, self.counts = {}, {}
        if names and accelerator.num_processes > 1:
            means = accelerator.reduce(means, reduction="mean")
        return dict(zip(names, means.tolist(), strict=True))


@dataclass
class Advice:
    """Warns, each once, of what the logs say about the settings."""

    config: XSAMConfig
    steps_far_above: int = 0
    skipped_before: int = 0
    said_skipped: bool = False
    said_rounded: bool = False

    def read(self, logs: Mapping[str, float], steps: int) -> None:
        """Look at one line of logs, with the loss and X-SAM's metrics, which are means over `steps`."""
        if "xsam/sharpness" in logs:
            self._large_rho(logs, steps)
        self._all_skipped(logs.get(SKIPPED_STEPS, 0), steps)
        if abs(logs.get("xsam/realised_perturbation", 1.0) - 1) > ROUNDING_TOLERANCE and not self.said_rounded:
            self.said_rounded = True
            logger.warning(
                "Half-precision weights moved by only %.2f times the requested perturbation (rho is %g): the rest was "
                "lost to rounding. Load the model in float32 (bf16=True or fp16=True still computes in half "
                "precision), or raise rho.",
                logs["xsam/realised_perturbation"],
                self.config.rho,
            )

    def _all_skipped(self, skipped: float, steps: int) -> None:
        since, self.skipped_before = skipped - self.skipped_before, int(skipped)
        if since > 0 and steps == 0 and not self.said_skipped:
            self.said_skipped = True
            logger.warning(
                "X-SAM skipped all %d steps since the last log: each had no gradient, or one that is not finite. Look "
                "for a loss that is inf or nan, a learning rate that is too large, or batches that the training step "
                "leaves out.",
                since,
            )

    def _large_rho(self, logs: Mapping[str, float], steps: int) -> None:
        if self.steps_far_above >= PATIENCE or self.config.takes_one_pass:
            return  # said already; and in one pass the loss is the perturbed one
        far_above = logs["xsam/sharpness"] > LARGE_SHARPNESS * abs(logs["loss"])
        self.steps_far_above = self.steps_far_above + steps if far_above else 0
        if self.steps_far_above >= PATIENCE:
            logger.warning(
                "The perturbed loss has been more than %g times the loss for %d steps (last: %.3g and %.3g). "
                "If the loss does not fall, lower rho (it is %g) or raise it slowly with rho_warmup_steps.",
                1 + LARGE_SHARPNESS,
                self.steps_far_above,
                logs["loss"] + logs["xsam/sharpness"],
                logs["loss"],
                self.config.rho,
            )

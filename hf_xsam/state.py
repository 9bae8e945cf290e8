"""What X-SAM carries from one optimizer step to the next, and what it logs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tensors import norm, reciprocal_or_zero, scale, wide_dtype


@dataclass
class XSAMState:
    """State of X-SAM, at hand as `trainer.xsam_state`.

    Attributes:
        eigenvector: parameter name to tensor, jointly of norm 1, float32 or wider; None before the first
            refresh. One set before `train()` is the warm start of the first refresh, of any norm.
        eigenvalue: Rayleigh quotient of the last refresh, 0-dimensional, in units of loss per squared weight;
            None before it.
        step: optimizer steps taken.
        shift: spectral shift of the power iteration, 0-dimensional and at most 0: see
            [`hf_xsam.eigenvector.power_iteration`].
    """

    eigenvector: dict[str, Tensor] | None = None
    eigenvalue: Tensor | None = None
    step: int = 0
    shift: Tensor | None = None

    def eigenvector_over(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the eigenvector's part for each of `parameters`: a 0-dimensional zero where it has none."""
        known = self.eigenvector or {}
        return [known[name] if name in known else parameter.new_zeros(()) for name, parameter in parameters.items()]

    def warm_start(self, parameters: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Return the eigenvector over `parameters`, normalized, zero for those it does not name; None if unset.

        Raises:
            ValueError: where it names none of the parameters, or has another shape than one of them.
        """
        if self.eigenvector is None:
            return None
        if not self.eigenvector.keys() & parameters.keys():
            raise ValueError(
                f"xsam_state.eigenvector names {next(iter(self.eigenvector), None)!r}, and no parameter in "
                f"eigen_scope; it must map names such as {next(iter(parameters))!r} to tensors, or be None."
            )
        vector = []
        for name, parameter in parameters.items():
            part = self.eigenvector.get(name, torch.zeros_like(parameter))
            if part.shape != parameter.shape:
                raise ValueError(
                    f"xsam_state.eigenvector[{name!r}] has shape {tuple(part.shape)}; it must have the parameter's, "
                    f"{tuple(parameter.shape)}."
                )
            vector.append(part.to(parameter.device, wide_dtype(parameter)))
        return scale(reciprocal_or_zero(norm(vector)), vector)


@dataclass
class RunningMeans:
    """Means of metrics over the optimizer steps since they were last taken, kept on the device until then."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count in one step's values, each 0-dimensional."""
        for name, value in metrics.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> tuple[list[str], Tensor | None]:
        """Return the names and a vector of their means, and start over; (`[]`, None) where nothing was added."""
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names]) if names else None
        self.sums, self.counts = {}, {}
        return names, means

"""What X-SAM carries from one optimizer step to the next."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional.power_iteration import Eigenpair, Spectrum
from .functional.tensors import Part, is_sharded, norm, reciprocal_or_zero, scale, shard_like, whole_shape, wide_dtype


@dataclass
class XSAMState:
    """State of X-SAM, available as `trainer.xsam_state` and saved in the Trainer's checkpoints.

    Attributes:
        eigenvector: parameter name to tensor, jointly of norm 1, float32 or wider; None before the first
            refresh. Sharded as the parameters are. If you set it in a fresh state, before `train()`, the first refresh
            starts from it; it may have any norm and must hold whole tensors.
        eigenvalue: Rayleigh quotient of the last refresh, 0-dimensional, in units of loss per squared weight;
            None before it.
        spectrum: what the products so far tell of the Hessian: the mean of the last Rayleigh quotients, which is what
            is logged, and the power iteration's shift; None before the first refresh. See
            [`hf_xsam.functional.power_iteration.Spectrum`].
        step: optimizer steps taken, skipped ones included.
        refreshed_at: optimizer step of the last refresh, counted from X-SAM's first; None before it.
        skipped_steps: steps that were not X-SAM's because a gradient was not finite, or there was none.
    """

    eigenvector: dict[str, Tensor] | None = None
    eigenvalue: Tensor | None = None
    spectrum: Spectrum | None = None
    step: int = 0
    refreshed_at: int | None = None
    skipped_steps: int = 0

    def take(self, estimate: Eigenpair, parameters: Mapping[str, Tensor], step: int) -> None:
        """Keep what the refresh of optimizer step `step` has found, over these parameters."""
        self.eigenvector = {
            name: Part.of(part, parameter.place) if isinstance(parameter, Part) else part
            for (name, parameter), part in zip(parameters.items(), estimate.vector, strict=True)
        }
        self.eigenvalue, self.spectrum, self.refreshed_at = estimate.value, estimate.spectrum, step

    def eigenvector_over(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the eigenvector's part for each of `parameters`: a 0-dimensional zero where it has none."""
        known = self.eigenvector or {}
        return [
            known[name] if name in known else torch.zeros((), dtype=wide_dtype(parameter), device=parameter.device)
            for name, parameter in parameters.items()
        ]

    def warm_start(self, parameters: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Return the eigenvector over `parameters`, normalized, zero for those it does not name; None if unset.

        Raises:
            ValueError: where it names none of the parameters, or has another shape than one of them.
        """
        if self.eigenvector is None:
            return None
        if not self.eigenvector.keys() & parameters.keys():
            raise ValueError(
                f"xsam_state.eigenvector names {next(iter(self.eigenvector), None)!r}, which is not a parameter in "
                f"eigen_scope; it must map names such as {next(iter(parameters))!r} to tensors, or be None."
            )
        vector = []
        for name, parameter in parameters.items():
            part = self.eigenvector.get(name)
            if part is None:
                part = torch.zeros_like(parameter)
            shape = parameter.shape if is_sharded(part) else whole_shape(parameter)
            if part.shape != shape:
                raise ValueError(
                    f"xsam_state.eigenvector[{name!r}] has shape {tuple(part.shape)}; it must have the parameter's, "
                    f"{tuple(shape)}."
                )
            part = part if is_sharded(part) else shard_like(part, parameter)
            vector.append(part.detach().to(parameter.device, wide_dtype(parameter)))
        if self.refreshed_at is not None and self.eigenvector.keys() == parameters.keys():
            return vector  # of norm 1 as it came from the refresh; no copy is needed
        return scale(reciprocal_or_zero(norm(vector)), vector)

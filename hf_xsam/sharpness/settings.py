"""`MeasureSettings`: what is measured of a model's sharpness, and how exactly."""

from dataclasses import dataclass, field, fields

import numpy as np

from ..config import Hvp, refuse_kind, refuse_scope


@dataclass
class MeasureSettings:
    """What [`measure`], [`~hf_xsam.XSAMCallback`] and `hf-xsam sharpness` measure, and how exactly.

    Args:
        top_k (`int`, *optional*, defaults to 1):
            Eigenpairs of the Hessian, the algebraically largest first, at least 1.
        trace_samples (`int`, *optional*, defaults to 8):
            Random vectors for the Hessian's trace, one Hessian-vector product each: 0 for no trace, or at least 2.
        rhos (`list[float]`, *optional*, defaults to `[0.01, 0.05]`):
            Radii of SAM's sharpness, above 0, in the units of the weights.
        slice_radius (`float`, *optional*, defaults to 0.5):
            How far the slices reach to either side of the weights, above 0, in the units of the weights.
        slice_points (`int`, *optional*, defaults to 21):
            Points on each slice, at equal distances: 0 for no slices.
        eigen_scope (`str`, *optional*, defaults to `"trainable"`):
            The parameters that the Hessian spans, and that are moved: values as for `XSAMConfig.eigen_scope`.
        hvp (`str`, *optional*, defaults to `"auto"`):
            How Hessian-vector products are computed: values as for `XSAMConfig.hvp`.
        tolerance (`float`, *optional*, defaults to 1e-3):
            Largest relative residual of the eigenpairs, see [`hf_xsam.functional.spectrum.top_eigenpairs`].
        seed (`int`, *optional*, defaults to 0):
            Seed of Lanczos's start and of the trace's random vectors.

    Raises:
        ValueError: for a value that is not allowed; the message names the field, the value and what is.
    """

    top_k: int = field(default=1, metadata={"help": "Number of eigenvalues to find, the largest first."})
    trace_samples: int = field(default=8, metadata={"help": "Random vectors for the Hessian's trace; 0 for no trace."})
    rhos: list[float] = field(
        default_factory=lambda: [0.01, 0.05], metadata={"help": "Radii to measure SAM's sharpness at."}
    )
    slice_radius: float = field(default=0.5, metadata={"help": "How far the slices reach from the weights."})
    slice_points: int = field(default=21, metadata={"help": "Points on each slice of the loss; 0 for no slices."})
    eigen_scope: str = field(
        default="trainable",
        metadata={"help": "Parameters to measure over: 'trainable', 'lora', 'norm', or a regular expression."},
    )
    hvp: Hvp = field(
        default="auto",
        metadata={
            "help": "Hessian-vector products: 'exact' (double backward), 'finite_difference', or 'auto', exact if the "
            "model allows it."
        },
    )
    tolerance: float = field(
        default=1e-3, metadata={"help": "Relative residual below which an eigenpair counts as found."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random vectors."})

    def __post_init__(self) -> None:
        for spec in fields(self):
            refuse_kind(spec.name, getattr(self, spec.name), spec.type)
        refuse_scope("eigen_scope", self.eigen_scope)
        for name, least in (("top_k", 1), ("slice_points", 0), ("tolerance", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.trace_samples < 0 or self.trace_samples == 1:
            raise ValueError(
                f"trace_samples is {self.trace_samples}; it must be 0, or at least 2 for a standard error."
            )
        if self.slice_radius <= 0:
            raise ValueError(f"slice_radius is {self.slice_radius}; it must be above 0.")
        if not all(rho > 0 for rho in self.rhos):
            raise ValueError(f"rhos are {list(self.rhos)}; they must be above 0.")

    def slice_distances(self) -> list[float]:
        """Return the distances from the weights at which the slices have their points, the lowest first."""
        return np.linspace(-self.slice_radius, self.slice_radius, self.slice_points).round(9).tolist()

"""How sharp a model's minimum is: `measure` gives the Hessian's top eigenpairs and trace, SAM's sharpness, and slices.

from hf_xsam.sharpness import MeasureSettings, measure

sharpness = measure(model, dataloader, MeasureSettings(top_k=3))
sharpness.save("output/sharpness.json")
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..functional.hessian_vector_products import HessianVectorProduct
from ..functional.power_iteration import random_unit_vector
from ..functional.spectrum import Trace, hutchinson_trace, top_eigenpairs
from ..functional.tensors import add_scaled, is_sharded, norm, reciprocal_or_zero, scale
from ..step.gradients import gradients_set_aside
from ..step.modes import evaluating
from ..step.scope import parameters_in_scope
from ..step.side_effects import Moment, Surroundings
from .landscape import Landscape, LossFunction, Slice, angle_degrees, model_loss, plain_accelerator, uphill
from .progress import Progress, Report, bar
from .settings import MeasureSettings

FILE_NAME = "sharpness.json"
PACKAGES = ("hf_xsam", "torch", "transformers", "accelerate", "scipy", "peft")


@dataclass
class Sharpness:
    """What [`measure`] found. All is of the mean loss over the data, with respect to the parameters in eigen_scope.

    Attributes:
        model: what it is called.
        loss: L(w).
        gradient_norm: norm(g) of g = grad L(w).
        eigenvalues: of the Hessian at w, the algebraically largest first.
        residuals: norm(H v - lambda v) / abs(lambda) of each eigenvalue lambda and its eigenvector v: at most about the
            settings' tolerance, or the error of finite differences where that is larger.
        eigenvectors: theirs, each by parameter name, jointly of norm 1, in float32 or wider, on the parameters'
            devices. They are not written to files.
        gradient_angles_degrees: between g and each eigenvector, 0 to 90: an eigenvector has no sign, so 120 degrees
            from v are 60 from -v. 90 where g is zero.
        trace: the Hessian's, by Hutchinson's estimate; None where none was asked for.
        sam_sharpness: L(w + rho * g / norm(g)) - L(w) by rho.
        slices: of the loss along "eigenvector", the first, in the sense in which the loss rises, and along "gradient",
            g / norm(g); empty where none were asked for.
        settings: what was measured, on what, and how.
        versions: of Python and packages.
    """

    model: str
    loss: float
    gradient_norm: float
    eigenvalues: list[float]
    residuals: list[float]
    eigenvectors: list[dict[str, Tensor]] = field(repr=False)
    gradient_angles_degrees: list[float]
    trace: Trace | None
    sam_sharpness: dict[float, float]
    slices: dict[str, Slice]
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return all but the eigenvectors as a dictionary that JSON can hold."""
        return {
            "model": self.model,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "eigenvalues": self.eigenvalues,
            "residuals": self.residuals,
            "gradient_angles_degrees": self.gradient_angles_degrees,
            "trace": asdict(self.trace) if self.trace else None,
            "sam_sharpness": {str(rho): value for rho, value in self.sam_sharpness.items()},
            "slices": {name: asdict(slice_) for name, slice_ in self.slices.items()},
            "settings": self.settings,
            "versions": self.versions,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON to `path`, to `sharpness.json` in it where it is a folder, and return the file's path."""
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return file


def measure(
    model: nn.Module,
    dataloader: Iterable[Any],
    settings: MeasureSettings | None = None,
    *,
    compute_loss: LossFunction | None = None,
    progress: bool | Report = True,
    accelerator: Accelerator | None = None,
) -> Sharpness:
    """Measure the sharpness of the mean loss of `model` over the data, in evaluation mode.

    The model, its gradients, buffers and modes, and all random generators are afterwards as they were, also if an
    exception ends it. One batch at a time is on the model's device, and one graph; a copy of the weights in
    `eigen_scope` while they are moved; and the eigenvectors. Lanczos holds 2 * top_k + 4 vectors in main memory.

    Args:
        model: any; wrapped or compiled, it is measured as its author wrote it.
        dataloader: batches, read once and kept. Batches count by their targets, that is by examples, or by tokens that
            have a label, so that an uneven last one is right.
        settings: what to measure; by default `MeasureSettings()`.
        compute_loss: called as compute_loss(model, batch), returns the mean loss of a batch, 0-dimensional; by default
            that of a transformers model, whose batches have `labels`.
        progress: whether to show a bar, where stderr is a terminal; or what to call as progress(part, done, total) on
            the way, with the number of batches done and in all. Each batch counts again for every loss, gradient and
            Hessian-vector product.
        accelerator: the trainer's, for its mixed precision; by default there is none. With several processes, each
            must bring the same data.

    Raises:
        ValueError: for settings that do not fit the model, no data, batches without labels, and parameters sharded by
            FSDP.
        ImportError: without scipy.
        ArithmeticError: where the loss or a derivative is not finite, or the eigenpairs are not found.
        RuntimeError: where hvp is "exact" and the model has no second derivative.
    """
    settings = MeasureSettings() if settings is None else settings
    with plain_accelerator(model) if accelerator is None else nullcontext(accelerator) as accelerator:
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        scope = parameters_in_scope(model, settings.eigen_scope, "eigen_scope")
        parameters = list(scope.values())
        if any(is_sharded(parameter) for parameter in parameters):
            raise ValueError(
                "The model is sharded by FSDP: use hf_xsam.sharpness.top_eigenpair, which gathers no vector."
            )
        shown = nullcontext(progress) if callable(progress) else bar(progress)
        with _nothing_left_behind(model, parameters[0].device) as before, shown as report:

            def loss_on(model: nn.Module, batch: Any) -> Tensor:
                before.restore()  # a batch's loss depends on the weights alone
                loss = (compute_loss or model_loss)(model, batch)
                counter.batch_done()
                return loss

            landscape = Landscape(accelerator, model, dataloader, loss_on, parameters)
            counter = Progress(report, settings, landscape.batches)
            counter.begin("gradient")
            loss, gradient = landscape.loss(), landscape.gradient()
            length = norm(gradient)
            if not math.isfinite(loss) or not torch.isfinite(length):
                raise ArithmeticError(
                    f"The loss is {loss}, its gradient's norm {length.item()}: they must be finite. "
                    "Measure in float32, on data whose loss is."
                )
            curvature = landscape.curvature(settings.hvp)
            counter.begin("eigenvalues")
            with curvature.hessian() as product_of:
                product = counter.counted(product_of)
                # The gradient has much of its length along the top eigenvectors. The random part is there in case it
                # is orthogonal to one.
                start = add_scaled(random_unit_vector(parameters, settings.seed), reciprocal_or_zero(length), gradient)
                values, vectors = top_eigenpairs(product, start, settings.top_k, settings.tolerance)
                residuals = [residual(product, value, v) for value, v in zip(values, vectors, strict=True)]
                counter.begin("trace")
                known = (values, vectors)
                samples, seed = settings.trace_samples, settings.seed
                trace = hutchinson_trace(product, parameters, samples, seed, *known) if samples else None
            counter.begin("sharpness")
            sam_sharpness = {rho: landscape.perturbed_loss(gradient, rho) - loss for rho in settings.rhos}
            slices = {}
            if distances := settings.slice_distances():
                counter.begin("slices")
                slices["eigenvector"] = landscape.slice_along(uphill(vectors[0], gradient), distances)
                slices["gradient"] = landscape.slice_along(scale(reciprocal_or_zero(length), gradient), distances)
        conditions = {
            "batches": landscape.batches,
            "targets": landscape.targets,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "eigen_scope": settings.eigen_scope,
            "hvp": curvature.method,
            "tolerance": settings.tolerance,
            "seed": settings.seed,
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "mixed_precision": accelerator.mixed_precision,
            "device": str(parameters[0].device),
        }
    return Sharpness(
        model=getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
        loss=loss,
        gradient_norm=length.item(),
        eigenvalues=values,
        residuals=residuals,
        eigenvectors=[dict(zip(scope, vector, strict=True)) for vector in vectors],
        gradient_angles_degrees=[angle_degrees(gradient, vector) for vector in vectors],
        trace=trace,
        sam_sharpness=sam_sharpness,
        slices=slices,
        settings=conditions,
        versions=installed_versions(),
    )


def residual(product: HessianVectorProduct, eigenvalue: float, eigenvector: Sequence[Tensor]) -> float:
    """Return norm(H v - lambda v) / abs(lambda)."""
    distance = norm(h - eigenvalue * v for h, v in zip(product(eigenvector), eigenvector, strict=True))
    return distance.item() / abs(eigenvalue)


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of those packages that results depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@contextmanager
def _nothing_left_behind(model: nn.Module, device: torch.device) -> Iterator[Moment]:
    undone = Surroundings(model, device).undone()
    with evaluating(model), undone as before, gradients_set_aside(model), torch.enable_grad():
        yield before

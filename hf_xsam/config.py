"""`XSAMConfig`: every setting of X-SAM, its range and where it comes from."""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .functional.correction import Correction
from .settings_file import CONFIG_NAME, find_settings_file, read_settings_file

SCOPES = ("trainable", "lora", "norm")
Hvp = Literal["auto", "exact", "finite_difference"]


@dataclass
class XSAMConfig:
    """Settings of X-SAM (arXiv 2601.10251).

    The defaults are the paper's update with a radius for finetuning and a cheaper estimate of the eigenvector;
    [`XSAMConfig.paper`] has the authors' radius and estimate.

    Parameters that control the perturbation:
        rho (`float`, *optional*, defaults to 0.01):
            Radius of the perturbation, at least 0. The paper uses 0.05 and 0.1 for CNNs from scratch;
            finetuning needs less.
        perturbation (`str`, *optional*, defaults to `"gradient"`):
            `"gradient"` perturbs along the gradient, as SAM does, which takes two passes a step. `"eigenvector"`
            perturbs by rho * v or -rho * v in turn, v the top eigenvector, and `"random"` along a random direction in
            place of v, which both take one: see [`XSAMConfig.one_pass`].
        adaptive (`bool`, *optional*, defaults to `False`):
            Scale the perturbation by the weights (ASAM, arXiv 2102.11600). Its rho is 10 to 40 times larger.
        rho_warmup_steps (`int`, *optional*, defaults to 0):
            Optimizer steps over which rho grows linearly from 0.
        ascent (`str`, *optional*, defaults to `"global"`):
            `"global"` perturbs along the gradient of all processes' batches, `"local"` lets each process
            perturb along its own (m-sharpness, arXiv 2010.01412), which saves an all-reduce.
        perturb_scope (`str`, *optional*, defaults to `"trainable"`):
            The parameters that are perturbed, within rho over them alone: `"trainable"`, all; `"lora"`, LoRA's, not
            what PEFT trains beside them; `"norm"`, those of normalization layers (SAM-ON, arXiv 2306.04226); or a
            regular expression searched for in the names of the trainable parameters.

    Parameters that control when it begins:
        start_step (`float`, *optional*, defaults to 0):
            Optimizer step from which on steps are X-SAM's; those before it are the stock Trainer's, at its price. Below
            1 it is a share of all steps, as `warmup_steps` of `TrainingArguments` is. All other steps that the settings
            name count from it.

    Parameters that control the correction:
        alpha (`float`, *optional*, defaults to 0.2):
            Strength of the correction, 0 to 2. At 0 there is none, and with `perturbation="gradient"` no eigenvector is
            estimated: the run is SAM.
        correction (`str`, *optional*, defaults to `"paper"`):
            `"paper"` (Eq. 11), `"projection"` (Theorem 5.1) or `"aligned"`: see
            [`hf_xsam.functional.correction.correction_factors`].
        normalize_gradient (`bool`, *optional*, defaults to `True`):
            Start the correction from the perturbed gradient over its norm, as Eq. 11 does; `False` from the gradient
            as it is. Steps that are not corrected, as with alpha 0, keep its norm either way.

    Parameters that control the eigenvector:
        eigen_interval (`int`, *optional*, defaults to 4):
            Optimizer steps between two refreshes, at least 1; with `perturbation="random"`, between two directions. The
            paper uses 3 and 5.
        eigen_start_step (`int`, *optional*, defaults to 0):
            Optimizer step of the first refresh. Every step before it is plain SAM; with `perturbation="eigenvector"`
            it is the stock Trainer's.
        eigen_warmup_steps (`int`, *optional*, defaults to 80):
            Optimizer steps, from the first refresh on, over which the interval grows from 1 to `eigen_interval`: the
            Hessian changes most at the beginning, when the eigenvector is still to be found.
        power_iterations (`int`, *optional*, defaults to 1):
            Power iterations a refresh, at least 1.
        eigen_batch_fraction (`float`, *optional*, defaults to 0.25):
            Share of a step's examples that exact Hessian-vector products are computed on, above 0 to 1: the first rows
            of as many micro-batches as it takes. Finite differences take all, whose gradient is known.
        eigen_momentum (`float`, *optional*, defaults to 0.8):
            Weight of the old eigenvector in each power iteration, from 0 to below 1, which averages over the batches
            of several refreshes: see
            [`hf_xsam.functional.power_iteration.power_iteration`].
        hvp (`str`, *optional*, defaults to `"auto"`):
            How Hessian-vector products are computed: `"exact"` (double backward), `"finite_difference"`,
            or `"auto"`, exact wherever the model's operations allow it.
        eigen_scope (`str`, *optional*, defaults to `"trainable"`):
            The parameters that the eigenvector spans, and that it corrects the gradient of: values as for
            `perturb_scope`.

    Parameters that control checks and logs:
        replay_check (`str`, *optional*, defaults to `"first"`):
            Which steps are run once more at the same weights, to warn where that gives another loss or gradient:
            `"first"`, the first one of a training; `"every"`, which is for debugging; or `"never"`.
        log_metrics (`str`, *optional*, defaults to `"summary"`):
            `"summary"` logs `xsam/rayleigh_quotient`, `xsam/angle_degrees` and `xsam/sharpness`, and
            `xsam/skipped_steps` where there are any; `"all"` logs every metric.

    Raises:
        ValueError: for a value that is not allowed; the message names the field, the value and what is.
    """

    rho: float = field(default=0.01, metadata={"help": "Radius of the perturbation, >= 0."})
    perturbation: Literal["gradient", "eigenvector", "random"] = field(
        default="gradient",
        metadata={"help": "Perturb along the gradient (two passes), the eigenvector or a random direction (one pass)."},
    )
    adaptive: bool = field(default=False, metadata={"help": "Scale the perturbation by the weights (ASAM)."})
    rho_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which rho grows linearly from 0, >= 0."}
    )
    start_step: float = field(
        default=0, metadata={"help": "Optimizer step, or below 1 share of all steps, from which on X-SAM takes part."}
    )
    ascent: Literal["global", "local"] = field(
        default="global",
        metadata={"help": "Perturb along the gradient of all processes, or each process along its own."},
    )
    perturb_scope: str = field(
        default="trainable",
        metadata={"help": "Parameters to perturb: 'trainable', 'lora', 'norm', or a regular expression on names."},
    )
    alpha: float = field(
        default=0.2, metadata={"help": "Strength of the correction along the eigenvector, 0 (plain SAM) to 2."}
    )
    correction: Correction = field(
        default="paper",
        metadata={
            "help": "Correction along the eigenvector: 'paper' (Eq. 11), 'projection' (damps) or 'aligned' (amplifies)."
        },
    )
    normalize_gradient: bool = field(
        default=True, metadata={"help": "Divide the perturbed gradient by its norm, as the paper does."}
    )
    eigen_interval: int = field(default=4, metadata={"help": "Optimizer steps between eigenvector refreshes, >= 1."})
    eigen_start_step: int = field(
        default=0,
        metadata={
            "help": "Optimizer step of the first eigenvector refresh, >= 0; before it steps have no eigenvector."
        },
    )
    eigen_warmup_steps: int = field(
        default=80, metadata={"help": "Optimizer steps over which the interval grows from 1 to eigen_interval, >= 0."}
    )
    power_iterations: int = field(default=1, metadata={"help": "Power iterations per eigenvector refresh, >= 1."})
    eigen_batch_fraction: float = field(
        default=0.25, metadata={"help": "Share of a step's examples for exact Hessian-vector products, > 0 to 1."}
    )
    eigen_momentum: float = field(
        default=0.8, metadata={"help": "Weight of the old eigenvector in a power iteration, >= 0 and < 1."}
    )
    hvp: Hvp = field(
        default="auto",
        metadata={
            "help": "Hessian-vector products: 'exact', 'finite_difference', or 'auto', exact if the model allows it."
        },
    )
    eigen_scope: str = field(
        default="trainable",
        metadata={
            "help": "Parameters of the eigenvector: 'trainable', 'lora', 'norm', or a regular expression on names."
        },
    )
    replay_check: Literal["first", "every", "never"] = field(
        default="first", metadata={"help": "Steps that are run once more at the same weights, to see if they agree."}
    )
    log_metrics: Literal["summary", "all"] = field(
        default="summary", metadata={"help": "Log the eigenvalue, its angle and the sharpness, or every metric."}
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            refuse_kind(f"XSAMConfig.{spec.name}", getattr(self, spec.name), spec.type)
        for name in ("rho", "start_step"):
            if getattr(self, name) < 0:
                raise self._error(name, "at least 0")
        if self.start_step >= 1 and self.start_step != int(self.start_step):
            raise self._error("start_step", "a whole number of steps, or a share of them below 1")
        if self.takes_one_pass:
            self._refuse_in_one_pass()
        if not 0 <= self.alpha <= 2:
            raise self._error("alpha", "from 0 to 2")
        if not 0 < self.eigen_batch_fraction <= 1:
            raise self._error("eigen_batch_fraction", "above 0 and at most 1")
        if not 0 <= self.eigen_momentum < 1:
            raise self._error("eigen_momentum", "from 0 to below 1")
        for name, least in (
            ("eigen_interval", 1),
            ("eigen_start_step", 0),
            ("eigen_warmup_steps", 0),
            ("rho_warmup_steps", 0),
            ("power_iterations", 1),
        ):
            if getattr(self, name) < least:
                raise self._error(name, f"an integer of at least {least}")
        for name in ("perturb_scope", "eigen_scope"):
            refuse_scope(f"XSAMConfig.{name}", getattr(self, name))

    def _refuse_in_one_pass(self) -> None:
        """Raise for settings of SAM's perturbation, or of the correction, that have no meaning in one pass."""
        allowed = {"adaptive": (False, "it scales the gradient"), "ascent": ("global", "it is about the gradient")}
        if self.perturbation == "random":
            allowed["alpha"] = 0, "there is no eigenvector"
            allowed["eigen_scope"] = "trainable", "perturb_scope says what moves"
        else:
            allowed["perturb_scope"] = "trainable", "eigen_scope says what moves"
        for name, (only, why) in allowed.items():
            if getattr(self, name) != only:
                raise self._error(name, f"{only!r} with perturbation={self.perturbation!r}: {why}")

    def _error(self, name: str, allowed: str) -> ValueError:
        return ValueError(f"XSAMConfig.{name} is {getattr(self, name)!r}; it must be {allowed}.")

    @classmethod
    def paper(cls, **settings: Any) -> "XSAMConfig":
        """Return the paper's settings with its authors' estimate of the eigenvector; `settings` override them.

        rho is 0.05, and every 5 steps there are 5 power iterations on all of the step's examples, which cost about as
        much as SAM's two passes. As in the authors' code, the steps before the first interval is over are SAM's.
        """
        interval = settings.get("eigen_interval", 5)
        authors = {
            "rho": 0.05,
            "eigen_interval": interval,
            "eigen_start_step": interval,
            "eigen_warmup_steps": 0,
            "power_iterations": 5,
            "eigen_batch_fraction": 1.0,
            "eigen_momentum": 0.0,
        }
        return cls(**(authors | settings))

    @classmethod
    def one_pass(cls, rho: float | None = None, *, perturbation: str = "eigenvector", **settings: Any) -> "XSAMConfig":
        """Return settings under which a step takes one forward and backward pass; `settings` override them.

        The weights move by rho * v or -rho * v in turn, v the Hessian's top eigenvector, and nothing is corrected. The
        loss of the steps is then L + rho^2 / 2 * lambda in the mean, lambda the top eigenvalue, up to O(rho^4), and
        their gradient its gradient, for that of lambda needs no derivative of v (Hellmann and Feynman). Refreshes are
        not denser at the beginning: with such a rho, training collapsed.

        `one_pass(rho, perturbation="random")` moves them along a random direction in place of v, another one every
        `eigen_interval` steps (random weight perturbation, arXiv 2404.00357). In the mean the loss is
        L + rho^2 / 2 * tr(H) / n then, of n weights, again up to O(rho^4). It needs no eigenvector.

        Args:
            rho: radius of the perturbation; by default 0.05 along v and 0.4 along a random direction, 5 and 40 times
                SAM's default, as the best radii were on a CNN from scratch.
            perturbation: `"eigenvector"` or `"random"`.
            **settings: other fields of `XSAMConfig`.
        """
        if rho is None:
            rho = 0.4 if perturbation == "random" else 0.05
        one_pass: dict[str, Any] = {"perturbation": perturbation, "alpha": 0.0, "rho": rho, "eigen_warmup_steps": 0}
        return cls(**(one_pass | settings))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "XSAMConfig":
        """Build the settings from what `to_dict` returned; fields left out keep their defaults.

        Raises:
            ValueError: for an unknown field or a value that is not allowed.
        """
        known = [spec.name for spec in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"XSAMConfig has no field {', '.join(unknown)}; its fields are {', '.join(known)}.")
        return cls(**settings)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the settings to `xsam_config.json` in `folder`, which is made where there is none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, repo_or_path: str | os.PathLike[str], *, subfolder: str | None = None, **hub_options: Any
    ) -> "XSAMConfig":
        """Read the settings that a model was trained with, from its folder or from the hub.

        Args:
            repo_or_path: a folder that `save_pretrained` or the trainer wrote, or a model's name on the hub.
            subfolder: folder within it, such as `"last-checkpoint"`.
            **hub_options: passed on to [`~huggingface_hub.hf_hub_download`]: `revision`, `token`, `cache_dir`, ...

        Raises:
            OSError: where there is no `xsam_config.json` to be had.
            ValueError: for a file that is not such settings. Either names the file and what to do.
        """
        path = find_settings_file(repo_or_path, subfolder, hub_options)
        settings = read_settings_file(path)
        try:
            return cls.from_dict(settings)
        except ValueError as error:
            raise ValueError(
                f"{path}: {error} If a newer hf_xsam wrote the file, update hf_xsam; otherwise correct the file."
            ) from error

    def first_step(self, max_steps: int) -> int:
        """Return the optimizer step that X-SAM begins at, of a training of `max_steps`."""
        return math.ceil(self.start_step * max_steps) if self.start_step < 1 else int(self.start_step)

    def rho_at(self, step: int) -> float:
        """Return the radius at X-SAM's optimizer step `step`, counted from 0, under the linear warmup."""
        return self.rho * min(1.0, step / self.rho_warmup_steps) if self.rho_warmup_steps else self.rho

    def signed_rho_at(self, step: int) -> float:
        """Return s * rho at X-SAM's optimizer step `step`, s = 1 and -1 in turn: by the step alone.

        The steps that refresh v take turns too, for they may take both sides, or more time.
        """
        turn = step if self.eigen_interval % 2 else step + step // self.eigen_interval
        return self.rho_at(step) * (1 if turn % 2 == 0 else -1)

    def eigen_interval_at(self, step: int) -> int:
        """Return the steps between two refreshes at optimizer step `step`, counted from 0, under the linear warmup."""
        warmed = step - self.eigen_start_step
        if warmed >= self.eigen_warmup_steps:
            return self.eigen_interval
        return 1 + (self.eigen_interval - 1) * warmed // self.eigen_warmup_steps

    @property
    def takes_one_pass(self) -> bool:
        """Return whether a step takes one forward and backward pass, at weights that are perturbed before it."""
        return self.perturbation != "gradient"

    @property
    def needs_eigenvector(self) -> bool:
        """Return whether steps are corrected along the eigenvector, or perturbed along it."""
        return self.alpha > 0 or self.perturbation == "eigenvector"

    def refreshes_at(self, step: int, last: int | None) -> bool:
        """Return whether the eigenvector, last refreshed at step `last`, is refreshed at step `step`, from 0."""
        begun = self.needs_eigenvector and step >= self.eigen_start_step
        # A step that is not after the last refresh belongs to a training that has begun anew.
        return begun and (last is None or not 0 < step - last < self.eigen_interval_at(step))

    def corrects_at(self, step: int) -> bool:
        """Return whether the gradient of optimizer step `step`, counted from 0, is corrected, not plain SAM's."""
        return self.alpha > 0 and step >= self.eigen_start_step


def refuse_kind(name: str, value: Any, kind: Any) -> None:
    """Raise a ValueError where the setting `name` is not of its `kind`, if that is a Literal, bool, int or float."""
    if get_origin(kind) is Literal:
        fits, allowed = value in get_args(kind), f"one of {', '.join(map(repr, get_args(kind)))}"
    elif kind is bool:
        fits, allowed = isinstance(value, bool), "True or False"
    elif kind is int:
        fits, allowed = isinstance(value, int) and not isinstance(value, bool), "an integer"
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, allowed = number and math.isfinite(value), "a finite number"
    else:
        return
    if not fits:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}.")


def refuse_scope(name: str, scope: str) -> None:
    """Raise a ValueError where the setting `name` names no scope, and is no regular expression either."""
    try:
        re.compile(scope)
    except (re.error, TypeError) as error:
        allowed = f"{', '.join(map(repr, SCOPES))} or a regular expression ({error})"
        raise ValueError(f"{name} is {scope!r}; it must be {allowed}.") from error

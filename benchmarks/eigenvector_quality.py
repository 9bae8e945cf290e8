"""How near X-SAM's eigenvector is to the top eigenvector of a large sample's loss, along a real training run."""

from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from contenders import xsam
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from workload import SEED, Workload

from hf_xsam import XSAMConfig
from hf_xsam.functional.tensors import dot
from hf_xsam.sharpness import MeasureSettings, Sharpness, measure

# The correction vanishes in float32, so that all estimates watch the same run: SAM's.
NO_CORRECTION = {"alpha": 1e-300, "correction": "projection", "normalize_gradient": False}
TOP = 3


@dataclass
class Watch(TrainerCallback):
    """Compares a trainer's eigenvector with the reference at every so many steps.

    Attributes:
        workload: whose examples the reference is measured on.
        every: steps between two comparisons.
        references: by step, filled by the first run and used by the later ones.
    """

    workload: Workload
    every: int
    references: dict[int, tuple[list[float], list[list[Tensor]], Tensor]]
    cosines: list[float] = field(default_factory=list)
    captured: list[float] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Note the cosine with the top eigenvector, and the share of its eigenvalue that the estimate has."""
        if state.global_step % self.every:
            return
        weights = nn.utils.parameters_to_vector([p for p in model.parameters() if p.requires_grad]).detach()
        if state.global_step not in self.references:
            found = self._reference(model)
            vectors = [list(vector.values()) for vector in found.eigenvectors]
            self.references[state.global_step] = (found.eigenvalues, vectors, weights.clone())
        values, vectors, reference_weights = self.references[state.global_step]
        torch.testing.assert_close(weights, reference_weights, rtol=1e-4, atol=1e-6)  # the same run
        estimate = list(self.trainer.xsam_state.eigenvector.values())
        cosines = [abs(dot(estimate, vector).item()) for vector in vectors]
        self.cosines.append(cosines[0])
        self.captured.append(sum(v * c**2 for v, c in zip(values, cosines, strict=True)) / values[0])

    def _reference(self, model: nn.Module) -> Sharpness:
        sample = self.workload.dataset.shuffle(seed=SEED).select(range(self.workload.reference_size))
        sample = sample.with_format(self.workload.dataset.format["type"])
        loader = DataLoader(sample, self.workload.batch_size, collate_fn=self.workload.collator)
        without = {"trace_samples": 0, "rhos": [], "slice_points": 0}
        settings = MeasureSettings(top_k=TOP, tolerance=1e-2, hvp=self.workload.reference_hvp, **without)
        return measure(model, loader, settings, progress=False)


def quality(workload: Workload, configs: dict[str, XSAMConfig], folder: str, steps: int, every: int) -> dict[str, Any]:
    """Return for each of `configs` what its eigenvector was worth along the same SAM run.

    cosine: mean absolute cosine with the reference's top eigenvector. captured: mean over the reference's top
    eigenvalue of the quadratic form of the estimate in the space of the reference's top eigenvectors, which does not
    fall where two eigenvalues are near each other and the estimate is between their eigenvectors.
    """
    references: dict = {}
    results = {}
    for name, config in configs.items():
        watch = Watch(workload, every, references)
        trainer = xsam(replace(config, **NO_CORRECTION))(**workload.settings(folder, steps))
        watch.trainer = trainer
        trainer.add_callback(watch)
        trainer.train()
        results[name] = {
            "cosine": fmean(watch.cosines),
            "captured": fmean(watch.captured),
            "cosines": watch.cosines,
            "eigenvalues": [references[step][0] for step in sorted(references)],
        }
    return results

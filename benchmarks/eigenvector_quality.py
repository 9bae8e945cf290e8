"""How near X-SAM's eigenvector is to the top eigenvector of the loss, along the recipes' own runs.

    python benchmarks/eigenvector_quality.py
    python benchmarks/eigenvector_quality.py --runs bert vit --seeds 0 --settings eigen_interval=10 --output ten.json

At each tenth of a run, v is compared with the top eigenvector of many training examples in evaluation mode, which
Lanczos finds. `captured` is v's Rayleigh quotient on these examples over their top eigenvalue: 1 for the top
eigenvector, and hardly less for a vector between two whose eigenvalues are nearly the same.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from pages import filled, markdown
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import HfArgumentParser, TrainerCallback, set_seed
from versions import setting
from workloads import cnn

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.functional.power_iteration import first_vector
from hf_xsam.functional.spectrum import top_eigenpairs
from hf_xsam.functional.tensors import add_scaled, dot
from hf_xsam.sharpness.callback import choose_batches
from hf_xsam.sharpness.landscape import Landscape
from hf_xsam.step.gradients import gradients_set_aside
from hf_xsam.step.modes import evaluating
from hf_xsam.step.scope import parameters_in_scope

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results" / "eigenvector_quality.json"
TENTHS = 10
SAMPLE_SEED = 0  # of the examples that the reference is measured on
TOLERANCE = 5e-2  # of Lanczos' residual; the eigenvalue's error is of the order of its square


class Run(NamedTuple):
    """A recipe with its configuration, and the training examples that the reference is measured on.

    Attributes:
        recipe: the module in `recipes/`.
        options: its command line, without the seed.
        sample: training examples.
        hvp: how the reference's products are computed: finite differences are exact enough on a smooth model in
            evaluation mode, at a third of the cost.
    """

    recipe: str
    options: Sequence[str]
    sample: int
    hvp: str


def recipe(module: str, config: str, sample: int, hvp: str, *options: str) -> Run:
    """Return a run of a recipe's own configuration, without the measurement at its end."""
    path = str(HERE.parent / "recipes" / "configs" / config)
    return Run(module, [path, "--eigenvalue_samples", "0", "--max_eval_samples", "8", *options], sample, hvp)


RUNS = {
    "bert": recipe("text_classification", "movie_reviews.yaml", 192, "finite_difference"),
    "vit": recipe("image_classification", "digits.yaml", 512, "exact"),
    "cnn": Run("", [], 512, "exact"),
    # The recipes' own 128 examples are a dozen steps.
    "llama": recipe("causal_lm", "movie_text.yaml", 16, "finite_difference", "--max_train_samples", "1000"),
    "sft": recipe("sft", "movie_sentiment.yaml", 16, "finite_difference", "--max_train_samples", "320"),
}


@dataclass
class QualityArguments:
    """Which runs to watch, and with which of X-SAM's settings."""

    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"help": f"Of {', '.join(RUNS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A run for each."})
    settings: list[str] = field(
        default_factory=list, metadata={"help": "name=value, fields of XSAMConfig that differ from the recipe's."}
    )
    output: str = field(
        default=str(RESULTS), metadata={"help": "The JSON file; the default one fills README.md's table too."}
    )


@dataclass
class Watch(TrainerCallback):
    """Compares a trainer's eigenvector with the reference's at each tenth of its run."""

    run: Run
    trainer: XSAMTrainer
    tenths: list[dict[str, float]] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the comparison, if a tenth is over."""
        if state.global_step * TENTHS // state.max_steps > (state.global_step - 1) * TENTHS // state.max_steps:
            random_state = torch.get_rng_state()  # from which dropout draws
            self.tenths.append({"step": state.global_step, **self._compare()})
            torch.set_rng_state(random_state)

    def _compare(self) -> dict[str, float]:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        parameters = parameters_in_scope(model, trainer.xsam_config.eigen_scope, "eigen_scope")
        weights, estimate = list(parameters.values()), trainer.xsam_state.eigenvector_over(parameters)
        data = choose_batches(trainer, trainer.train_dataset, self.run.sample, SAMPLE_SEED)
        with evaluating(model), gradients_set_aside(model):
            landscape = Landscape(trainer.accelerator, model, data, self._loss, weights)
            with landscape.curvature(self.run.hvp).hessian() as product:
                # Near what is known, with a part of all directions, so that no other eigenvector is missed.
                start = add_scaled(first_vector(landscape.gradient(), SAMPLE_SEED), torch.ones(()), estimate)
                [top], [vector] = top_eigenpairs(product, start, 1, TOLERANCE)
                quotient = dot(estimate, product(estimate)).item()
        return {
            "eigenvalue": top,
            "cosine": abs(dot(estimate, vector).item()),
            "captured": quotient / top,
            "logged": trainer.xsam_state.spectrum.eigenvalue.item(),
        }

    def _loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        return self.trainer.compute_loss(model, dict(batch))


def watched(run: Run, seed: int, settings: dict[str, str]) -> list[dict[str, float]]:
    """Return the comparisons along one run."""
    watches = []

    def watch(trainer: XSAMTrainer) -> XSAMTrainer:
        watches.append(Watch(run, trainer))
        trainer.add_callback(watches[0])
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        if run.recipe:
            train_recipe(run, ["--output_dir", folder, "--seed", str(seed), "--use_cpu", "true"], settings, watch)
        else:
            train_cnn(folder, seed, settings, watch)
    return watches[0].tenths


def train_recipe(run: Run, options: Sequence[str], settings: dict[str, str], watch: Callable[..., XSAMTrainer]) -> None:
    """Run the recipe as its command does, with `watch` called on the trainer that it makes."""
    module = importlib.import_module(run.recipe)  # in recipes/, which `workloads` puts on the path
    make = module.make_trainer
    module.make_trainer = lambda *args, **kwargs: watch(make(*args, **kwargs))
    try:
        changed = [text for name, value in settings.items() for text in (f"--{name}", value)]
        module.main([*run.options, *options, "--disable_tqdm", "true", *changed])
    finally:
        module.make_trainer = make


def train_cnn(folder: str, seed: int, settings: dict[str, str], watch: Callable[..., XSAMTrainer]) -> None:
    """Train the CNN with batch norm of `workloads.py` for 20 epochs."""
    workload = cnn()
    parser = HfArgumentParser(XSAMConfig)
    (config,) = parser.parse_args_into_dataclasses(
        [text for name, value in {"rho": str(workload.rho), **settings}.items() for text in (f"--{name}", value)]
    )
    made = workload.settings(folder, max_steps=20 * len(workload.dataset) // workload.batch_size)
    made["args"].seed = seed
    set_seed(seed)
    for layer in made["model"].modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    watch(XSAMTrainer(xsam_config=config, **made)).train()


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> Table:
    """Return captured at each tenth, a run a line, means over the seeds, and the smallest and largest seed's mean."""
    shown = Table("run", "seeds", *(f"{tenth}0%" for tenth in range(1, TENTHS + 1)), "mean (of seeds)", "cosine")
    for name, seeds in results.items():
        tenths = [fmean(run[tenth]["captured"] for run in seeds.values()) for tenth in range(TENTHS)]
        means = [fmean(tenth["captured"] for tenth in run) for run in seeds.values()]
        cosine = fmean(tenth["cosine"] for run in seeds.values() for tenth in run)
        total = f"{fmean(means):.2f} ({min(means):.2f} to {max(means):.2f})"
        shown.add_row(name, str(len(seeds)), *(f"{value:.2f}" for value in tenths), total, f"{cosine:.2f}")
    return shown


def main() -> None:
    """Watch the runs that have no figures yet, print the table, and write it."""
    (arguments,) = HfArgumentParser(QualityArguments).parse_args_into_dataclasses()
    settings = dict(text.split("=", 1) for text in arguments.settings)
    file = Path(arguments.output)
    contents = (
        json.loads(file.read_text()) if file.exists() else {"settings": settings, "setting": setting(), "runs": {}}
    )
    if contents["settings"] != settings:
        sys.exit(f"{file} is of --settings {contents['settings']}: name another --output, or remove it.")
    results = contents["runs"]
    for seed in arguments.seeds:
        for name in arguments.runs:
            if str(seed) not in results.setdefault(name, {}):
                results[name][str(seed)] = watched(RUNS[name], seed, settings)
                file.write_text(json.dumps(contents, indent=1) + "\n")
                Console(width=160).print(table({name: results[name]}))
    Console(width=160).print(table(results))
    if file == RESULTS:
        PAGE.write_text(filled(PAGE, {"eigenvector": markdown(table(results))}), encoding="utf-8")


if __name__ == "__main__":
    main()

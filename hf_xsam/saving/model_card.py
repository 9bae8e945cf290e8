"""X-SAM's part of the model card, added to the stock card."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase

from ..config import XSAMConfig
from ..settings_file import CONFIG_NAME
from ..step.logs import NOT_RESULTS

if TYPE_CHECKING:
    from transformers import Trainer

TAG = "x-sam"
PLOT_NAME = "xsam_sharpness.png"

ONE_PASS = {
    "eigenvector": "one pass a step, at weights perturbed along the Hessian's top eigenvector",
    "random": "one pass a step, at weights perturbed along a random direction",
}
FIGURES = {
    "xsam/rayleigh_quotient": "Rayleigh quotient of the eigenvector",
    "xsam/angle_degrees": "angle between gradient and top eigenvector, degrees",
    "xsam/sharpness": "sharpness, perturbed loss - loss",
}
FIGURES_IN_ONE_PASS = FIGURES | {"xsam/sharpness": "sharpness, rho^2 / 2 * Rayleigh quotient"}

CITATIONS = """\
```bibtex
@misc{duan2026xsam,
  title = {{X-SAM}: Boosting Sharpness-Aware Minimization with Dominant-Eigenvector Gradient Correction},
  author = {Duan, Hongru and Chen, Yongle and Guan, Lei},
  year = {2026},
  eprint = {2601.10251},
  archivePrefix = {arXiv},
}
@inproceedings{foret2021sharpnessaware,
  title = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
}
```
"""

Logs = Sequence[Mapping[str, Any]]


def prepare_adapter_card(trainer: "Trainer") -> None:
    """Write PEFT's card for an adapter if there is no card yet: by it, the stock method recognizes an adapter."""
    model = _model_of(trainer)
    if hasattr(model, "create_or_update_model_card") and not _card_path(trainer).exists():
        model.create_or_update_model_card(trainer.args.output_dir)


def complete_model_card(trainer: "Trainer", config: XSAMConfig, base_model: str | None = None) -> None:
    """Add X-SAM's tag, evaluations and section to the stock card, and draw its plot.

    Args:
        trainer: the trainer whose `output_dir` has the card.
        config: its X-SAM settings.
        base_model: hub name of the model that training started from, if the caller gave one.
    """
    path, history = _card_path(trainer), trainer.state.log_history
    card = ModelCard.load(path)
    metrics = evaluations(history)
    # PEFT names the folder that a local base model was loaded from, in a tag too; the hub refuses the card for it.
    tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:") or is_hub_name(tag.split(":")[-1])]
    card.data.tags = [*(tag for tag in tags if tag != TAG), TAG]
    if isinstance(card.data.base_model, str | None):
        card.data.base_model = next((name for name in (card.data.base_model, base_model) if is_hub_name(name)), None)
    if card.data.eval_results:
        card.data.eval_results = [*card.data.eval_results, *further_results(card.data.eval_results, metrics)]

    repo = trainer.hub_model_id or trainer.args.hub_model_id or str(trainer.args.output_dir)
    loading = loading_snippet(_model_of(trainer), trainer.processing_class, repo, card.data.base_model)
    plot = draw_plot(history, path.with_name(PLOT_NAME), config.takes_one_pass)
    card.text += xsam_section(config, metrics, history, plot, loading, repo)
    card.save(path)


def is_hub_name(name: str | None) -> bool:
    """Return whether `name` can be the name of a model on the hub and is not a local folder."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return name is not None and not os.path.isdir(name)


def evaluations(history: Logs) -> dict[str, dict[str, float]]:
    """Return the last metrics of each evaluated split, such as `{"eval": {"loss": 0.4, "accuracy": 0.8}}`."""
    found = {}
    for line in history:
        for split in [name.removesuffix("_runtime") for name in line if name.endswith("_runtime")]:
            metrics = {name.removeprefix(f"{split}_"): x for name, x in line.items() if name.startswith(f"{split}_")}
            found[split] = {name: x for name, x in metrics.items() if not name.endswith(NOT_RESULTS)}
    found.pop("train", None)  # means over the run, which are in the stock card
    return found


def further_results(stock: Sequence[EvalResult], metrics: Mapping[str, Mapping[str, float]]) -> list[EvalResult]:
    """Return the metrics that are missing in the stock card's evaluation results, for the same task and data set.

    Args:
        stock: the stock card's results, at least one. The hub requires a task and a data set, so the stock method
            writes no results if it knows neither.
        metrics: as returned by [`evaluations`].
    """
    results = []
    for split, values in metrics.items():
        # The stock card has only the evaluation split, under the name that the data set gives it.
        named = stock[0].dataset_split if split == "eval" else split.removeprefix("eval_")
        for name, value in values.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue  # `compute_metrics` may return anything; the hub takes numbers
            title = " ".join(part.capitalize() for part in name.split("_"))
            result = replace(
                stock[0], dataset_split=named, metric_type=name, metric_name=title, metric_value=value, metric_args=None
            )
            if not any(result.is_equal_except_value(other) for other in stock):
                results.append(result)
    return results


def xsam_section(
    config: XSAMConfig,
    metrics: Mapping[str, Mapping[str, float]],
    history: Logs,
    plot: str | None,
    loading: str,
    repo: str,
) -> str:
    """Return X-SAM's part of the card, as Markdown."""
    repeat = f"from hf_xsam import XSAMConfig\n\nxsam_config = XSAMConfig.from_pretrained({json.dumps(repo)})"
    of_two_passes = "X-SAM" if config.alpha > 0 else "SAM (X-SAM with alpha 0, that is without its correction)"
    method = ONE_PASS.get(config.perturbation, of_two_passes)
    parts = [
        "## Sharpness-aware training",
        f"This model was trained with {method}, using hf_xsam {version('hf_xsam')}. X-SAM "
        "([arXiv 2601.10251](https://arxiv.org/abs/2601.10251)) is sharpness-aware minimization "
        "([arXiv 2010.01412](https://arxiv.org/abs/2010.01412)) that corrects its gradient along the Hessian's top "
        "eigenvector.",
        "### How to load it",
        f"```python\n{loading}\n```",
        "### Settings",
        markdown_table(("field", "value"), [(f"`{name}`", f"`{x}`") for name, x in config.to_dict().items()]),
        f"They are in `{CONFIG_NAME}`. To train with the same settings again:",
        f"```python\n{repeat}\n```",
    ]
    if metrics:
        names = list(dict.fromkeys(name for values in metrics.values() for name in values))
        rows = [(split, *(_number(values.get(name)) for name in names)) for split, values in metrics.items()]
        parts += ["### Metrics", markdown_table(("split", *names), rows)]
    if rows := sharpness_rows(history, FIGURES_IN_ONE_PASS if config.takes_one_pass else FIGURES):
        parts += [
            "### Sharpness during training",
            "On the training batches, averaged between two logs.",
            markdown_table(("", "first", "last", "lowest", "highest"), rows),
        ]
    if plot:
        losses = "the perturbed loss" if config.takes_one_pass else "the loss and the perturbed loss"
        parts.append(f"![The Rayleigh quotient, {losses} by optimizer step]({plot})")
    return "\n\n" + "\n\n".join([*parts, "### Citations", CITATIONS])


def sharpness_rows(history: Logs, figures: Mapping[str, str] = FIGURES) -> list[tuple[str, ...]]:
    """Return a row for each of the `figures` of the run: its name, and its first, last, lowest and highest value."""
    rows = []
    for name, title in figures.items():
        if values := [line[name] for line in history if name in line]:
            # Steps that overflowed are not part of the range.
            finite = [x for x in values if math.isfinite(x)] or values
            rows.append((title, *map(_number, (values[0], values[-1], min(finite), max(finite)))))
    return rows


def draw_plot(history: Logs, path: Path, one_pass: bool = False) -> str | None:
    """Draw the eigenvector's Rayleigh quotient, the loss and the perturbed loss by step; return the file's name.

    In one pass the logged loss is the perturbed one, and there is no other. Return None if there are fewer than two
    logs to draw, or if matplotlib is missing.
    """
    lines = [line for line in history if "loss" in line and "xsam/sharpness" in line]
    if len(lines) < 2 or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    quotient = "xsam/rayleigh_quotient"
    panels = [("Rayleigh quotient", {"": quotient})] if any(quotient in line for line in lines) else []
    if one_pass:
        panels.append(("perturbed loss", {"": "loss"}))
    else:
        lines = [{**line, "perturbed": line["loss"] + line["xsam/sharpness"]} for line in lines]
        panels.append(("loss", {"loss": "loss", "perturbed loss": "perturbed"}))
    figure = Figure(figsize=(3.5 * len(panels), 2.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, name in curves.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=label)
        axes.set(title=title, xlabel="optimizer step")
        if len(curves) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=100)
    return path.name


def loading_snippet(model: Any, processing_class: Any, repo: str, base_model: str | None) -> str:
    """Return Python code that loads the model, or base model and adapter, and the tokenizer or processor.

    Args:
        model: the trained model, without wrappers of a distributed run.
        processing_class: the trainer's, or None.
        repo: a model's name on the hub, or a folder.
        base_model: hub name of an adapter's base model; None takes the name that PEFT stores.
    """
    if hasattr(model, "get_base_model"):
        base = model.get_base_model()
        base_model = base_model or model.peft_config[model.active_adapter].base_model_name_or_path
        labels = getattr(base.config, "num_labels", 2)
        options = "" if labels == 2 else f", num_labels={labels}"
        load = f".from_pretrained({json.dumps(base_model)}{options})" if base_model else "(...)"
        imports = [_origin(base), ("peft", "PeftModel")]
        code = [
            f"base_model = {type(base).__name__}{load}",
            f"model = PeftModel.from_pretrained(base_model, {json.dumps(repo)})",
        ]
    else:
        imports, code = [_origin(model)], [f"model = {type(model).__name__}.from_pretrained({json.dumps(repo)})"]
    if processing_class is not None:
        tokenizer = isinstance(processing_class, PreTrainedTokenizerBase)
        kind, variable = ("AutoTokenizer", "tokenizer") if tokenizer else ("AutoProcessor", "processor")
        imports.append(("transformers", kind))
        code.append(f"{variable} = {kind}.from_pretrained({json.dumps(repo)})")
    lines = []
    for module in sorted({module for module, _ in imports}):
        names = ", ".join(sorted(name for origin, name in imports if origin == module))
        lines.append(f"from {module} import {names}")
    return "\n".join([*lines, "", *code])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a vertical bar in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _origin(model: Any) -> tuple[str, str]:
    """Return the module and the name of the model's class."""
    module = type(model).__module__
    return "transformers" if module.startswith("transformers.") else module, type(model).__name__


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _card_path(trainer: "Trainer") -> Path:
    return Path(str(trainer.args.output_dir), "README.md")


def _model_of(trainer: "Trainer") -> Any:
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)

"""What the recipes share: their arguments, the trainer for a mode, and the closing table."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, Trainer

from hf_xsam import XSAMConfig, XSAMTrainer


@dataclass
class RecipeArguments:
    """The model, the data, and whether X-SAM takes part."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model on the hub or in a folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Local csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "Local file for the final test."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate and test on so many at most."})
    optimizer_mode: Literal["trainer", "sam", "xsam"] = field(
        default="xsam", metadata={"help": "The stock Trainer, SAM (alpha 0), or X-SAM."}
    )
    eigenvalue_samples: int = field(
        default=64, metadata={"help": "Training examples to measure the final top eigenvalue on; 0 skips it."}
    )


def parse_arguments(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `[settings.yaml] [--option value ...]`; options on the command line overrule the file's.

    Raises:
        ValueError: for a file that is not a mapping, or a key in it that no option has.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments.pop(0))
        settings = yaml.safe_load(path.read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds a {type(settings).__name__}; it must map option names to values.")
        known = {spec.name for kind in parser.dataclass_types for spec in fields(kind) if spec.init}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"{path} sets {', '.join(unknown)}, which no option of this recipe is called.")
        parser.set_defaults(**settings)
    return parser.parse_args_into_dataclasses(arguments)


def make_trainer(mode: str, xsam_config: XSAMConfig, **settings: Any) -> Trainer:
    """Return the trainer of `--optimizer_mode`: stock, SAM or X-SAM."""
    if mode == "trainer":
        return Trainer(**settings)
    return XSAMTrainer(xsam_config=replace(xsam_config, alpha=0.0) if mode == "sam" else xsam_config, **settings)


def top_eigenvalue(trainer: Trainer, count: int) -> float:
    """Return the top eigenvalue of the loss over the first `count` training examples, whatever trained the model."""
    measuring = XSAMTrainer(model=trainer.model, args=replace(trainer.args, report_to="none", push_to_hub=False))
    measuring.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(min(count, len(trainer.train_dataset)))])
    return measuring.top_eigenpair([batch], iterations=10)[1]


def card_facts(recipe: RecipeArguments, task: str, default_model: str, default_data: str) -> dict[str, Any]:
    """Return what `push_to_hub` is to say of task, model and data on the card.

    Args:
        recipe: names the model and the data, or neither.
        task: the hub's name for the task.
        default_model: hub name of the model that the recipe takes when none is given.
        default_data: what to call the data that it takes then.
    """
    facts: dict[str, Any] = {"tasks": task}
    if recipe.model_name_or_path is None:
        facts["finetuned_from"] = default_model
    if recipe.dataset_name:
        facts |= {"dataset_tags": recipe.dataset_name, "dataset_args": recipe.dataset_config_name}
    facts["dataset"] = recipe.dataset_name or (Path(recipe.train_file).name if recipe.train_file else default_data)
    return facts


def print_table(title: str, trainer: Trainer, metrics: dict[str, float]) -> None:
    """Print the run's metrics and X-SAM's last logged ones, one a line."""
    last = next((log for log in reversed(trainer.state.log_history) if "loss" in log), {})
    table = Table("metric", "value", title=title)
    rows = {**metrics, **{name: value for name, value in last.items() if name.startswith("xsam/")}}
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console(width=80).print(table)

"""What the recipes share: their arguments, the data, the trainer for a mode, and the closing table."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets import DatasetDict, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, Trainer, TrainingArguments

try:
    import resource
except ImportError:  # on Windows
    resource = None

from hf_xsam import XSAMCallback, XSAMConfig, XSAMTrainer
from hf_xsam.config import Hvp
from hf_xsam.data.splits import chosen, load_files, with_validation
from hf_xsam.sharpness import MeasureSettings, top_eigenpair
from hf_xsam.sharpness.callback import choose_batches
from hf_xsam.step.logs import NOT_RESULTS

logger = logging.getLogger(__name__)


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

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out for all.")


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
    parsed = parser.parse_args_into_dataclasses(arguments)
    announce_processes(next(part for part in parsed if isinstance(part, TrainingArguments)))
    return parsed


def announce_processes(args: TrainingArguments) -> None:
    """Print how many processes train, and how many examples a step takes.

    Raises:
        ValueError: where a launcher has started processes that do not know of each other, or fewer than asked for.
    """
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if started > args.world_size:
        raise ValueError(
            f"The launcher has started {started} processes (WORLD_SIZE), and Accelerate uses {args.world_size}: each "
            "would train alone, into the same folder. On a machine without GPUs, add --use_cpu true."
        )
    # The launcher sets both where it was asked for several processes, and leaves starting them to mpirun.
    if args.world_size == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        raise ValueError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes is. For several, replace --cpu by "
            "--multi_gpu and add --use_cpu true to the recipe's options."
        )
    if args.process_index == 0:
        processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        print(f"{processes}, effective batch {batch}", flush=True)


def load_splits(recipe: RecipeArguments, embedded: Callable[[], DatasetDict]) -> DatasetDict:
    """Load the data set named, the local files, or the embedded data, with a validation split in any case."""
    if recipe.dataset_name:
        splits = load_dataset(recipe.dataset_name, recipe.dataset_config_name)
    elif recipe.train_file:
        named = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
        splits = load_files({split: file for split, file in named.items() if file}, "train_file")
    else:
        splits = embedded()
    return with_validation(splits)


def limited(splits: DatasetDict, recipe: RecipeArguments) -> DatasetDict:
    """Return a random choice of each split, of `max_train_samples` and `max_eval_samples` at most."""
    limits = {name: recipe.max_train_samples if name == "train" else recipe.max_eval_samples for name in splits}
    return DatasetDict({name: chosen(split, limits[name]) for name, split in splits.items()})


def without_hidden_labels(splits: DatasetDict, column: str, number_of: dict) -> DatasetDict:
    """Leave out a test split with values that no class has: the hub's benchmarks keep its labels to themselves."""
    if "test" in splits and (hidden := set(splits["test"].unique(column)) - number_of.keys()):
        logger.warning(
            "The test split is left out: its %s has %s, which is no class of the training data.", column, hidden
        )
        return DatasetDict({name: split for name, split in splits.items() if name != "test"})
    return splits


def make_trainer(
    recipe: RecipeArguments,
    xsam_config: XSAMConfig,
    classes: tuple[type[Trainer], type[Trainer]] = (Trainer, XSAMTrainer),
    **settings: Any,
) -> Trainer:
    """Return the trainer of `--optimizer_mode`: of `classes`, the stock one, or X-SAM's as SAM or X-SAM."""
    stock, ours = classes
    if recipe.optimizer_mode == "trainer":
        return stock(**settings)
    sam = recipe.optimizer_mode == "sam"
    return ours(xsam_config=replace(xsam_config, alpha=0.0) if sam else xsam_config, **settings)


def train_and_report(
    trainer: Trainer, recipe: RecipeArguments, xsam_config: XSAMConfig, splits: DatasetDict, data: str, **card: Any
) -> dict[str, float]:
    """Train, evaluate on each split, save, print the closing table, push to the hub if asked; return the metrics.

    `data` names the data of a run without a data set or file of the user's; `card` is what the trainer's model card
    takes.
    """
    resume = trainer.args.resume_from_checkpoint
    if str(resume).lower() == "true":  # as the command line gives it, where a folder's name may stand too
        resume = True
    trained = trainer.train(resume_from_checkpoint=resume).metrics
    metrics = {"train_loss": trained["train_loss"], "train_runtime": trained["train_runtime"]}
    if resource is not None:
        metrics["peak_main_memory_gib"] = peak_main_memory_gib()
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in splits:
            for name, value in trainer.evaluate(splits[split], metric_key_prefix=prefix).items():
                if not name.endswith((*NOT_RESULTS, "epoch")):
                    # TRL's own metrics are called eval_... whatever the prefix.
                    metrics[f"{prefix}_{name.removeprefix(f'{prefix}_').removeprefix('eval_')}"] = value
    if recipe.eigenvalue_samples:
        try:
            metrics |= top_eigenvalue(trainer, recipe.eigenvalue_samples, xsam_config.hvp)
        except Exception as error:  # for want of memory, say: the model is to be saved all the same
            logger.warning("The top eigenvalue was not measured: %r", error)

    trainer.save_state()
    trainer.save_metrics("all", metrics)
    if trainer.args.push_to_hub:  # which saves the model first
        trainer.push_to_hub(**card)
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        title = f"{recipe.optimizer_mode} on {recipe.dataset_name or recipe.train_file or data}"
        print_table(title, trainer, metrics)
    return metrics


def peak_main_memory_gib() -> float:
    """Return the most main memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def top_eigenvalue(trainer: Trainer, count: int, hvp: Hvp) -> dict[str, float]:
    """Return the top eigenvalue of the trainer's loss over the first `count` training examples, with its residual."""
    examples = [trainer.train_dataset[i] for i in range(min(count, len(trainer.train_dataset)))]
    if trainer.is_fsdp_enabled:
        if trainer.is_world_process_zero():
            logger.warning("Under FSDP, top_eigenvalue is that of 20 power iterations: see how large its residual is.")
        size = trainer.args.per_device_train_batch_size
        whole = len(examples) - len(examples) % size or len(examples)  # equal batches, which count alike
        found = top_eigenpair(trainer, choose_batches(trainer, examples[:whole], whole, seed=0))
        eigenvalue, residual = found.eigenvalue, found.residual
    else:
        settings = MeasureSettings(trace_samples=0, rhos=[], slice_points=0, hvp=hvp)
        measured = XSAMCallback(trainer, samples=len(examples), dataset=examples, settings=settings).measure()
        (eigenvalue,), (residual,) = measured.eigenvalues, measured.residuals
    return {"top_eigenvalue": eigenvalue, "top_eigenvalue_residual": residual}


def card_facts(recipe: RecipeArguments, task: str, default_model: str | None, default_data: str) -> dict[str, Any]:
    """Return what `push_to_hub` is to say of task, model and data on the card.

    Args:
        recipe: names the model and the data, or neither.
        task: the hub's name for the task.
        default_model: hub name of the model that the recipe takes when none is given; None for one from scratch.
        default_data: what to call the data that it takes then.
    """
    facts: dict[str, Any] = {"tasks": task}
    if recipe.model_name_or_path is None and default_model is not None:
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

"""The options that all recipes have, and what is checked of them before any data is loaded."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import TrainingArguments

from hf_xsam.data.checks import InputError

SPLITS = ("train", "validation", "test")
SMALLER_IS_BETTER = ("perplexity", "mse")  # of the recipes' metrics; Transformers knows it of losses alone


@dataclass
class RecipeArguments:
    """The model, the data, and whether X-SAM takes part."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model on the hub or in a folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local csv, tsv, json, jsonl or parquet file to train on."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Local file to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "Local file for the final test."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate and test on so many at most."})
    optimizer_mode: Literal["trainer", "sam", "xsam"] = field(
        default="xsam", metadata={"help": "The stock Trainer, SAM (alpha 0), or X-SAM."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations without a better metric_for_best_model; needs "
            "load_best_model_at_end."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much the metric must be better to count, for early stopping."}
    )
    eigenvalue_samples: int = field(
        default=64, metadata={"help": "Training examples to measure the final top eigenvalue on; 0 skips it."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "early_stopping_patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1, or left out.")
        files = self.files()
        if files and self.dataset_name:
            option, path = next(iter(files.items()))
            raise InputError(f"dataset_name is {self.dataset_name!r} and {option} is {path!r}: name one of them.")
        for option, path in files.items():
            if not any(each.startswith("train_") for each in files):
                raise InputError(f"{option} is {path!r}, and there is no train_file: name one too.")

    def files(self) -> dict[str, str]:
        """Return the local files: the path by the option, `train_file`, `validation_file` and `test_file`."""
        options = [f"{split}_file" for split in SPLITS]
        return {option: path for option in options if (path := getattr(self, option))}

    def source(self, split: str) -> str:
        """Return what to call the data of a split in errors: its file, or the split of what."""
        files = self.files()
        named = {option.partition("_")[0]: path for option, path in files.items()}
        whole = self.dataset_name or named.get("train", "the recipe's own data")
        return named.get(split, f"the {split} split of {whole}")


def check_best_model(recipe: RecipeArguments, args: TrainingArguments) -> None:
    """Raise an InputError for early stopping without the best model, and for a best model that is the worst."""
    if recipe.early_stopping_patience and not args.load_best_model_at_end:
        raise InputError(
            f"early_stopping_patience is {recipe.early_stopping_patience}, and it stops for want of a better model: "
            "add --load_best_model_at_end true, with --eval_strategy epoch and --save_strategy epoch (or steps)."
        )
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if args.load_best_model_at_end and metric in SMALLER_IS_BETTER and args.greater_is_better:
        raise InputError(
            f"metric_for_best_model is {metric!r}, of which less is better: add --greater_is_better false."
        )


def check_output_folder(folder: str) -> None:
    """Raise an InputError if nothing can be written into a folder, which need not exist."""
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(
            f"output_dir is {folder!r}, and {str(nearest)!r} cannot be written: {error.strerror}."
        ) from error


def announce_processes(args: TrainingArguments) -> None:
    """Print how many processes train, and how many examples a step takes.

    Raises:
        InputError: where a launcher has started processes that do not know of each other, or fewer than asked for.
    """
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if started > args.world_size:
        raise InputError(
            f"The launcher has started {started} processes (WORLD_SIZE), and Accelerate uses {args.world_size}: each "
            "would train alone, into the same folder. On a machine without GPUs, add --use_cpu true."
        )
    # The launcher sets both where it was asked for several processes, and leaves starting them to mpirun.
    if args.world_size == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        raise InputError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes is. For several, replace --cpu by "
            "--multi_gpu and add --use_cpu true to the recipe's options."
        )
    if args.process_index == 0:
        processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        print(f"{processes}, effective batch {batch}", flush=True)

"""What the recipes share: the trainer for a mode, a run from training to the saved model, and how errors are said."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from arguments import RecipeArguments
from closing import peak_main_memory_gib, print_table, save_model, top_eigenvalue
from datasets import DatasetDict
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PreTrainedConfig, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.data.checks import InputError, one_line
from hf_xsam.step.logs import NOT_RESULTS

logger = logging.getLogger(__name__)


def run(main: Callable[[], Any]) -> None:
    """Run a recipe's `main`; after a mistake in options, files or data, print one line and exit with status 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def make_trainer(
    recipe: RecipeArguments,
    xsam_config: XSAMConfig,
    classes: tuple[type[Trainer], type[Trainer]] = (Trainer, XSAMTrainer),
    **settings: Any,
) -> Trainer:
    """Return the trainer of `--optimizer_mode`: of `classes`, the stock one, or X-SAM's as SAM or X-SAM.

    Raises:
        InputError: for settings that it refuses, and a repository that it cannot push to.
    """
    stock, ours = classes
    if recipe.early_stopping_patience:
        patience = EarlyStoppingCallback(recipe.early_stopping_patience, recipe.early_stopping_threshold)
        settings["callbacks"] = [patience]
    try:
        if recipe.optimizer_mode == "trainer":
            return stock(**settings)
        sam = recipe.optimizer_mode == "sam"
        return ours(xsam_config=replace(xsam_config, alpha=0.0) if sam else xsam_config, **settings)
    except (HTTPError, OSError) as error:
        args = settings["args"]
        if not args.push_to_hub:
            raise
        raise InputError(
            f"push_to_hub is true, and the repository {args.hub_model_id or Path(args.output_dir).name!r} cannot be "
            f"written: {one_line(error)}"
        ) from error
    except ValueError as error:
        raise InputError(one_line(error)) from error


def train_and_report(
    trainer: Trainer, recipe: RecipeArguments, xsam_config: XSAMConfig, splits: DatasetDict, data: str, **card: Any
) -> dict[str, float]:
    """Train, evaluate on each split, print the closing table, save, push to the hub if asked; return the metrics.

    `data` names the data of a run without a data set or file of the user's; `card` is what the trainer's model card
    takes.
    """
    trained = train(trainer)
    trainer.remove_callback(EarlyStoppingCallback)  # which would miss its metric in the test's
    metrics = {"train_loss": trained["train_loss"], "train_runtime": trained["train_runtime"]}
    metrics |= peak_main_memory_gib()
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

    # In this order: where the disk is full, what costs least space and most time is kept.
    if trainer.is_world_process_zero():
        named = recipe.dataset_name or next(iter(recipe.files().values()), data)
        title = f"{recipe.optimizer_mode} on {named}"
        print_table(title, trainer, metrics)
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    save_model(trainer, card)
    return metrics


def train(trainer: Trainer) -> dict[str, float]:
    """Train, from the checkpoint named if any, and return the training's own metrics.

    Raises:
        InputError: for a checkpoint that is missing or another model's.
    """
    resume = trainer.args.resume_from_checkpoint
    if not resume:
        return trainer.train().metrics
    if str(resume).lower() == "true":  # as the command line gives it, where a folder's name may stand too
        resume = True
    begun = Begun()
    trainer.add_callback(begun)
    try:
        check_checkpoint(get_last_checkpoint(trainer.args.output_dir) if resume is True else resume, trainer)
        return trainer.train(resume_from_checkpoint=resume).metrics
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        if begun.yes or isinstance(error, InputError):
            raise
        raise InputError(f"resume_from_checkpoint is {str(resume)!r}, which does not fit: {one_line(error)}") from error


class Begun(TrainerCallback):
    """Knows whether the checkpoint is loaded and training has begun."""

    yes = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.yes = True


def check_checkpoint(folder: str | None, trainer: Trainer) -> None:
    """Raise an InputError for a checkpoint of another kind of model, of which the Trainer would load what it can."""
    config = Path(folder or "", "config.json")
    if folder and config.is_file():
        saved, ours = PreTrainedConfig.get_config_dict(folder)[0].get("model_type"), trainer.model.config.model_type
        if saved != ours:
            raise InputError(
                f"resume_from_checkpoint is {folder!r}, a checkpoint of a {saved} model, and this one is a {ours}: "
                "name a checkpoint of this run, or the model with model_name_or_path."
            )

"""What the recipes do after training: measure the top eigenvalue, print the closing table, and save."""

import errno
import logging
import sys
from pathlib import Path
from typing import Any

from arguments import RecipeArguments
from huggingface_hub.errors import HTTPError
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import Trainer

try:
    import resource
except ImportError:  # on Windows
    resource = None

from hf_xsam import XSAMCallback
from hf_xsam.config import Hvp
from hf_xsam.data.checks import InputError, one_line
from hf_xsam.sharpness import MeasureSettings, top_eigenpair
from hf_xsam.sharpness.callback import choose_batches

logger = logging.getLogger(__name__)


def peak_main_memory_gib() -> dict[str, float]:
    """Return the most main memory that this process has held so far, where the system tells it."""
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"peak_main_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


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
    local = next(iter(recipe.files().values()), None)
    facts["dataset"] = recipe.dataset_name or (Path(local).name if local else default_data)
    return facts


def print_table(title: str, trainer: Trainer, metrics: dict[str, float]) -> None:
    """Print the run's metrics and X-SAM's last logged ones, one a line."""
    last = next((log for log in reversed(trainer.state.log_history) if "loss" in log), {})
    table = Table("metric", "value", title=title)
    rows = {**metrics, **{name: value for name, value in last.items() if name.startswith("xsam/")}}
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console(width=80).print(table)


def save_model(trainer: Trainer, card: dict[str, Any]) -> None:
    """Save the model, and push it to the hub if asked.

    Raises:
        InputError: if that fails; it says where model and results are.
    """
    args, repository = trainer.args, trainer.hub_model_id
    try:
        if args.push_to_hub:  # which saves the model first
            trainer.push_to_hub(**card)
        else:
            trainer.save_model()
    except (HTTPError, OSError, SafetensorError) as error:
        if args.push_to_hub and not of_the_disk(error):
            raise InputError(
                f"The push to the repository {repository!r} failed ({one_line(error)}). The model lies in "
                f"{args.output_dir!r}: push it by `hf upload {repository} {args.output_dir}`."
            ) from error
        raise InputError(
            f"The model could not be saved into {args.output_dir!r} ({one_line(error)}). The results are in "
            f"{str(Path(args.output_dir, 'all_results.json'))!r}."
        ) from error


def of_the_disk(error: Exception) -> bool:
    """Return whether an error is one of writing files, not of the network."""
    full = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS)
    return isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in full)

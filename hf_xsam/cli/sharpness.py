"""Measure how sharp the minimum of a saved model is, print a table, and write everything to sharpness.json."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..sharpness import MeasureSettings, Sharpness, measure
from ..sharpness.measuring import FILE_NAME
from ..step.refusals import first_line
from .data import DataArguments, load_split, prepare
from .saved_model import SavedModel


@dataclass
class SharpnessArguments:
    """The model, where to measure it, and where to write."""

    model: str = field(metadata={"help": "Folder or hub name of a model, or of a PEFT adapter."})
    device: str = field(
        default="auto", metadata={"help": "'cpu', 'cuda', 'cuda:1', ...; 'auto' uses a GPU if there is one."}
    )
    progress: bool = field(default=True, metadata={"help": "Show a bar on a terminal; --no_progress hides it."})
    output_file: str | None = field(
        default=None,
        metadata={
            "help": f"File to write; by default {FILE_NAME} in the model's folder, or for a hub model in a new folder "
            "here."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier measurement in the file to write."})


ARGUMENTS = (SharpnessArguments, DataArguments, MeasureSettings)


def run(arguments: SharpnessArguments, data: DataArguments, settings: MeasureSettings) -> None:
    """Measure, print, and write.

    Raises:
        FileExistsError: if there is an earlier measurement, and no `overwrite`.
        ValueError: for a model, data, column, split, device or scope that does not fit; the message says why.
        ArithmeticError: if the loss is not finite, or has no eigenpairs that can be found.
    """
    path = file_to_write(arguments)
    device = find_device(arguments.device)
    saved = SavedModel.find(arguments.model)
    torch.manual_seed(settings.seed)
    split = load_split(data)
    model, dataloader = prepare(saved, split, data)
    sharpness = measure(model.to(device), dataloader, settings, progress=arguments.progress)
    sharpness.model = arguments.model
    sharpness.settings = {**asdict(data), "samples": min(data.samples, len(split)), **sharpness.settings}
    print_table(sharpness)  # first, in case the file cannot be written
    print(f"Written to {sharpness.save(path)}")


def file_to_write(arguments: SharpnessArguments) -> Path:
    """Return the path of the file to write.

    Raises:
        FileExistsError: if there is such a file already, and no `overwrite`.
    """
    # A hub model's folder is one of its name, here.
    folder = Path(arguments.model if Path(arguments.model).is_dir() else Path(arguments.model).name)
    path = Path(arguments.output_file or folder / FILE_NAME)
    if path.is_dir():
        path = path / FILE_NAME
    if path.exists() and not arguments.overwrite:
        raise FileExistsError(
            f"{path} holds an earlier measurement: replace it with --overwrite, or name another file with "
            "--output_file."
        )
    return path


def find_device(name: str) -> torch.device:
    """Return the device that `name` names.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # the former from a torch without CUDA
        raise ValueError(f"device is {name!r}, which torch cannot use: {first_line(error)}") from error


def print_table(sharpness: Sharpness) -> None:
    """Print what was measured."""
    settings = sharpness.settings
    table = Table("", "value", title=f"{sharpness.model} on {settings['samples']} of {settings['dataset']}")
    table.add_row("loss", f"{sharpness.loss:.4g}")
    table.add_row("norm of the gradient", f"{sharpness.gradient_norm:.4g}")
    pairs = zip(sharpness.eigenvalues, sharpness.gradient_angles_degrees, strict=True)
    for i, (value, angle) in enumerate(pairs, start=1):
        table.add_row(f"eigenvalue {i}", f"{value:.4g} ({angle:.1f} degrees from the gradient)")
    if sharpness.trace:
        table.add_row("trace", f"{sharpness.trace.mean:.4g} ± {sharpness.trace.standard_error:.2g}")
    for rho, rise in sharpness.sam_sharpness.items():
        table.add_row(f"SAM sharpness, rho {rho}", f"{rise:.4g}")
    Console(width=100).print(table)

"""Draw runs side by side, as one figure and as one page for the browser."""

from dataclasses import dataclass, field
from pathlib import Path

FIGURE_NAME = "runs.png"
PAGE_NAME = "runs.html"


@dataclass
class PlotArguments:
    """Which runs to draw, and where to write the files."""

    runs: list[str] = field(
        metadata={
            "help": "Output folder of a Trainer, with its trainer_state.json or checkpoints, and sharpness.json where "
            "hf-xsam sharpness has written it; a trainer_state.json; or a folder with a sharpness.json alone."
        }
    )
    output: str = field(default="plot", metadata={"help": f"Folder to write {FIGURE_NAME} and {PAGE_NAME} into."})


ARGUMENTS = (PlotArguments,)


def run(arguments: PlotArguments) -> None:
    """Draw the runs into `arguments.output`, and print the paths of the two files.

    Raises:
        ValueError: if a run cannot be read, or there is nothing to draw; mostly a `RunError`.
        OSError: if the folder cannot be written into.
    """
    # Here, and not for the options' help: matplotlib and torch take seconds.
    from ..plotting import RunError, build_panels, draw_figure, read_runs, render_page

    runs = read_runs(arguments.runs)
    drawn = build_panels(runs)
    if not drawn:
        names = ", ".join(arguments.runs)
        raise RunError(
            f"Nothing to draw in {names}: no loss was logged yet, and no slice of it measured; train longer, or lower "
            "logging_steps."
        )
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    draw_figure(runs, drawn, folder / FIGURE_NAME)
    (folder / PAGE_NAME).write_text(render_page(runs, drawn), encoding="utf-8")
    for name in (FIGURE_NAME, PAGE_NAME):
        print(folder / name)

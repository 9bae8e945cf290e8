"""The command line: `hf-xsam plot`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields

from . import plot
from .plot import PlotArguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; on an error of theirs, print it and exit with status 2."""
    parser = ArgumentParser(prog="hf-xsam", description="See how sharp the minima are that models were trained into.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # HfArgumentParser makes an option of every field, and runs are to be given without one.
    plot_parser = commands.add_parser("plot", help="draw runs side by side", description=plot.__doc__)
    help_on = {spec.name: spec.metadata["help"] for spec in fields(PlotArguments)}
    plot_parser.add_argument("runs", nargs="+", metavar="RUN", help=help_on["runs"])
    plot_parser.add_argument("--output", metavar="DIR", default=PlotArguments.output, help=help_on["output"])

    arguments = parser.parse_args(argv)
    try:
        plot.run(PlotArguments(arguments.runs, arguments.output))
    except (plot.RunError, OSError) as error:
        plot_parser.exit(2, f"hf-xsam plot: {error}\n")

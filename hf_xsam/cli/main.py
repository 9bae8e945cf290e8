"""The command line: `hf-xsam COMMAND`, each command a module with a dataclass of arguments and a `run`."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from typing import NamedTuple

from transformers import HfArgumentParser


class Command(NamedTuple):
    """Where a command is: its module, whose `run` takes the dataclass `arguments`, imported only when it is named."""

    module: str
    arguments: str
    help: str


COMMANDS = {
    "sharpness": Command("hf_xsam.cli.sharpness", "SharpnessArguments", "measure how sharp a saved model is"),
    "plot": Command("hf_xsam.cli.plot", "PlotArguments", "draw runs side by side"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; a mistake in them ends it with a sentence and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    overview = "\n".join(f"  {name:<12}{command.help}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        prog="hf-xsam",
        description="Tools for sharpness-aware finetuning.",
        epilog=f"commands:\n{overview}\n\n`hf-xsam COMMAND --help` lists a command's options.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    name = parser.parse_args(words[:1]).command

    try:
        module = import_module(COMMANDS[name].module)
        kind = getattr(module, COMMANDS[name].arguments)
        first, *others = [spec.name for spec in fields(kind) if spec.default is spec.default_factory is MISSING]
        required = "".join(f" --{field} {field.upper()}" for field in others)
        usage = f"hf-xsam {name} {first.upper()}{required} [--option value ...]"
        parser = HfArgumentParser(kind, prog=f"hf-xsam {name}", usage=usage, description=module.__doc__)
        # HfArgumentParser makes an option of every field; what comes before the first one is the first field's.
        given = words[1:] and not words[1].startswith("-")
        (arguments,) = parser.parse_args_into_dataclasses([f"--{first}", *words[1:]] if given else words[1:])
        module.run(arguments)
    except ModuleNotFoundError as error:
        parser.exit(2, f"hf-xsam {name}: error: {error}. Commands need more packages: pip install 'hf_xsam[tools]'\n")
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"hf-xsam {name}: error: {error}\n")

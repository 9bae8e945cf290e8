"""The command line, `hf-xsam COMMAND`: each command is a module with dataclasses, `ARGUMENTS`, that its `run` takes."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A command's module, imported only when the command is named, and what it is for."""

    module: str
    help: str


COMMANDS = {
    "sharpness": Command("hf_xsam.cli.sharpness", "measure how sharp a saved model is"),
    "plot": Command("hf_xsam.cli.plot", "draw runs side by side"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; after a mistake in them, print one sentence and exit with status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    overview = "\n".join(f"  {name:<12}{command.help}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        prog="hf-xsam",
        description="Tools for sharpness-aware finetuning.",
        epilog=f"commands:\n{overview}\n\n`hf-xsam COMMAND --help` lists a command's options.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    name = parser.parse_args(words[:1]).command

    from transformers import HfArgumentParser  # not needed for the help above, and the import takes a second

    try:
        module = import_module(COMMANDS[name].module)
        specs = [spec for kind in module.ARGUMENTS for spec in fields(kind)]
        first, *others = [spec.name for spec in specs if spec.default is spec.default_factory is MISSING]
        required = "".join(f" --{field} {field.upper()}" for field in others)
        usage = f"hf-xsam {name} {first.upper()}{required} [--option value ...]"
        parser = HfArgumentParser(module.ARGUMENTS, prog=f"hf-xsam {name}", usage=usage, description=module.__doc__)
        # HfArgumentParser makes an option of every field; what comes before the first one is the first field's.
        given = words[1:] and not words[1].startswith("-")
        module.run(*parser.parse_args_into_dataclasses([f"--{first}", *words[1:]] if given else words[1:]))
    except ModuleNotFoundError as error:
        parser.exit(2, f"hf-xsam {name}: error: {error}. Commands need more packages: pip install 'hf_xsam[tools]'\n")
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"hf-xsam {name}: error: {error}\n")

"""Parse the recipes' options, from the command line and YAML files; a mistake in them is said in one line."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from arguments import announce_processes, check_best_model, check_output_folder
from transformers import HfArgumentParser, TrainingArguments

from hf_xsam.data.checks import InputError, one_line


class _Parser(HfArgumentParser):
    """Raises an InputError instead of printing all options."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}.")


def parse_arguments(kinds: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `[settings.yaml] [--option value ...]`; options on the command line overrule the file's.

    Raises:
        InputError: for an option that does not exist, a value that does not fit, and an output folder that cannot be
            written; the message names the YAML file if it is its mistake.
    """
    parser, arguments = _Parser(kinds), list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**read_settings(Path(arguments.pop(0)), parser))
    try:
        *parsed, remaining = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except ValueError as error:  # what TrainingArguments and XSAMConfig say of values that do not go together
        raise InputError(one_line(error)) from error
    if remaining:
        raise InputError(f"unrecognized option {remaining[0]}{_did_you_mean(remaining[0].lstrip('-'), parser)}")
    recipe, args = parsed[0], next(part for part in parsed if isinstance(part, TrainingArguments))
    check_best_model(recipe, args)
    announce_processes(args)
    if args.should_save:
        check_output_folder(args.output_dir)
    return tuple(parsed)


def read_settings(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    """Return what a YAML file sets, each value in its option's type.

    Raises:
        InputError: for a file that cannot be read or is not a mapping, a key that no option has, and a value of
            another type.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds a {type(settings).__name__}; it must map option names to values.")
    for key in settings:
        if key not in _types(parser):
            raise InputError(f"{path} sets {key}, which no option of this recipe is called{_did_you_mean(key, parser)}")
    return {key: _converted(path, key, value, parser) for key, value in settings.items()}


def _converted(path: Path, key: str, value: Any, parser: HfArgumentParser) -> Any:
    kind = str(_types(parser)[key])
    if value is None or (isinstance(value, list) and "list" in kind) or (isinstance(value, dict) and "dict" in kind):
        return value  # which no word of a command line is
    try:
        known, _ = parser.parse_known_args([f"--{key}={value}"])
    except InputError as error:
        raise InputError(f"{path} sets {key} to {value!r}: {error}") from error
    return getattr(known, key)


def _types(parser: HfArgumentParser) -> Mapping[str, Any]:
    """Return the options' types as they are declared: the parser overwrites those of the fields."""
    hints = [(kind, get_type_hints(kind)) for kind in parser.dataclass_types]
    return {spec.name: types[spec.name] for kind, types in hints for spec in fields(kind) if spec.init}


def _did_you_mean(name: Any, parser: HfArgumentParser) -> str:
    close = get_close_matches(str(name), _types(parser), n=1)
    return f": did you mean {close[0]}?" if close else "; --help lists them."

"""README and docs: every code block runs, every quoted message is in the source, every link leads somewhere."""

import ast
import json
import math
import re
import shlex
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from shutil import copytree
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_xsam import XSAMConfig
from hf_xsam.cli import main as command_line
from tests.cases import tiny_bert
from tests.fake_hub import Repository
from tests.helpers import examples_of, save_tiny_classifier, save_tiny_image_classifier, save_tiny_language_model
from tests.runs_on_disk import trained_runs

ROOT = Path(__file__).parent.parent
FOLDERS = ("experiments", "benchmarks", "docs")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")))]
MESSAGES = ROOT / "docs" / "troubleshooting.md"  # the page whose text blocks are messages
LANGUAGES = ("python", "bash", "yaml", "text")


@dataclass
class Block:
    """A code block of a page, with the number of its first line."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{name_of(self.page)}:{self.line}"


def name_of(page):
    return str(page.relative_to(ROOT))


@cache
def tokens_of(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(*languages):
    found = []
    for page in PAGES:
        for token in tokens_of(page):
            if token.type in ("fence", "code_block"):
                found.append(Block(page, token.map[0] + 2, token.info.strip(), token.content))
    return [block for block in found if block.language in languages or not languages]


def test_each_block_is_of_a_kind_that_is_tested():
    for block in blocks():
        assert block.language in LANGUAGES, f"{block}: no test knows how to run {block.language!r}"
        assert block.language != "text" or block.page == MESSAGES, f"{block}: only messages are text"


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_no_formula_is_taken_for_html(page):
    # <u, v> is text by CommonMark and a tag by Python-Markdown, which leaves it out of sight.
    for token in tokens_of(page):
        for part in token.children or ():
            assert part.type == "code_inline" or "<" not in part.content, part.content


# --- Python: a page's blocks, one after another, in a script that has built its model and data.


@pytest.fixture
def script(tmp_path, monkeypatch, hub):
    """The variables that the pages take for granted, in an empty folder, with a published run on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    XSAMConfig(rho=0.02).save_pretrained("published")
    settings = Path("published", "xsam_config.json").read_bytes()
    hub.repositories["user/model"] = Repository({"xsam_config.json": settings}, [("", {"xsam_config.json": settings})])
    model, batch = tiny_bert()
    folder = save_tiny_language_model(tmp_path / "language_model")
    return {
        "model": model,
        "train_dataset": examples_of(batch),
        "eval_dataset": examples_of(batch),
        "language_model": AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "MyTrainer": Trainer,
        "trainer": Trainer(model),
    }


@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")}), ids=name_of)
def test_python(page, script):
    for block in blocks("python"):
        if block.page == page:
            # As many lines above the code as on the page, so that an error names the line there.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), script)


# --- The shell: what a command does is done here, smaller; what it would install is compared with pyproject.toml.

PIP = {"-q", "-e", "-c", "constraints.txt"}
LANGUAGE_MODELS = ("causal_lm", "sft")  # get a tiny one in place of SmolLM2, whose 540 MB have a test of their own
SMALL = {
    "max_steps": 2, "max_train_samples": 16, "max_eval_samples": 8, "eigenvalue_samples": 0, "logging_steps": 1,
    "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "output_dir": "output",
}  # fmt: skip

# A model for each of the embedded data sets, and options that make its measurement short.
SAVE_TINY = {
    "digits": partial(save_tiny_image_classifier, classes=10),
    "movie_reviews": save_tiny_classifier,
    "movie_text": save_tiny_language_model,
}
FEW = ["--samples", "8", "--trace_samples", "2", "--slice_points", "3", "--device", "cpu", "--progress", "false"]


def commands():
    """Return each command of each line of each block, as its words, once for all pages."""
    found = {}
    for block in blocks("bash"):
        for number, line in enumerate(block.text.splitlines()):
            for command in line.split(" && "):
                where = f"{name_of(block.page)}:{block.line + number}"
                found.setdefault(command, pytest.param(shlex.split(command), id=where))
    return found.values()


@pytest.mark.parametrize("words", commands())
def test_shell(words, tmp_path, monkeypatch):
    match words:
        case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            pass  # CI makes its environment so
        case ["pytest"]:
            pass  # this run
        case ["pip", "install", *what]:
            (requirement,) = [word for word in what if word not in PIP]
            name, _, extras = requirement.rstrip("]").partition("[")
            assert name == "."  # it is on no index
            assert set(filter(None, extras.split(","))) <= known_extras()
            assert (ROOT / "constraints.txt").exists()
        case ["python", script, *options] if script.startswith("experiments/"):
            import_module(Path(script).stem).parse(options)  # they run for hours, and have tests of their own
        case ["python", script, *options] if script.startswith("benchmarks/"):
            assert (ROOT / script).is_file()  # likewise
        case ["python", script, *options]:
            run_recipe(script, options, tmp_path, monkeypatch)
        case ["accelerate", "launch", *arguments]:
            launch = launch_command_parser().parse_args(arguments)
            assert launch.config_file is None or (ROOT / launch.config_file).is_file()
            anywhere = ["--use_cpu", "true"] if "--bf16" in arguments else []  # which else asks for a GPU
            parse_only(launch.training_script, [*launch.training_script_args, *anywhere], monkeypatch)
        case ["hf-xsam", "sharpness", model, *arguments]:
            monkeypatch.chdir(tmp_path)
            SAVE_TINY[arguments[arguments.index("--dataset") + 1]](tmp_path / model)
            command_line.main(["sharpness", model, *arguments, *FEW])
            assert len(json.loads((tmp_path / model / "sharpness.json").read_text())["eigenvalues"]) > 0
        case ["hf-xsam", "plot", *arguments]:
            trained_runs(tmp_path / "trained")
            for run in arguments[: arguments.index("--output")]:
                copytree(tmp_path / "trained" / "xsam", tmp_path / run)
            monkeypatch.chdir(tmp_path)
            command_line.main(["plot", *arguments])
        case _:
            pytest.fail(f"no test knows how to run {shlex.join(words)}")


def known_extras():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n\n")[0]
    return {line.split(" = ")[0] for line in section.splitlines()}


def run_recipe(script, options, tmp_path, monkeypatch):
    """Run a recipe for two steps on what it has embedded; where it names something on the hub, parse its options."""
    if parse_only(script, options, monkeypatch)[0].dataset_name:
        return
    small = dict(SMALL)
    if Path(script).stem in LANGUAGE_MODELS:
        small["model_name_or_path"] = save_tiny_language_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    more = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    metrics = import_module(Path(script).stem).main([*found(options), *more])
    assert math.isfinite(metrics["eval_loss"])


class Parsed(Exception):
    """Ends a recipe once its own parser has read the options."""


def parse_only(script, options, monkeypatch):
    """Return what the parser of `script` makes of `options`: its arguments, the Trainer's and X-SAM's."""
    assert (ROOT / script).is_file()
    recipe = import_module(Path(script).stem)
    parse = recipe.parse_arguments

    def parse_and_stop(parser, argv):
        raise Parsed(*parse(parser, argv))

    monkeypatch.setattr(recipe, "parse_arguments", parse_and_stop)
    with pytest.raises(Parsed) as stopped:
        recipe.main(found(options))
    monkeypatch.setattr(recipe, "parse_arguments", parse)
    return stopped.value.args


def found(options):
    """Return the options with the repository's files named from anywhere."""
    return [str(ROOT / word) if word.startswith("recipes/") else word for word in options]


# --- YAML: settings files of a recipe.


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml(block, tmp_path, monkeypatch):
    settings = tmp_path / "settings.yaml"
    settings.write_text(block.text)
    recipe, args, xsam = parse_only("recipes/text_classification.py", [str(settings)], monkeypatch)
    for name, value in yaml.safe_load(block.text).items():
        assert value in [getattr(kind, name, None) for kind in (recipe, args, xsam)]


# --- Settings: every field of XSAMConfig, with its default and the paper's.


def test_settings():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.*?) ?\| ", page, re.MULTILINE)
    default, paper = XSAMConfig().to_dict(), XSAMConfig.paper().to_dict()
    expected = [
        (name, as_text(value), "" if paper[name] == value else as_text(paper[name])) for name, value in default.items()
    ]
    assert sorted(rows) == sorted(expected)


def as_text(value):
    return f'"{value}"' if isinstance(value, str) else str(value)


# --- Messages: quoted as the source has them, with … for what a run fills in.

FILLED_IN = re.compile(r"%(\.\d+)?[sdgfr]")


@cache
def source_messages():
    """Return every string in the package's source, with … for what is filled in."""
    messages = []
    for path in (ROOT / "hf_xsam").rglob("*.py"):
        tree, constants = ast.parse(path.read_text()), {}
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant | ast.JoinedStr):
                constants[statement.targets[0].id] = text_of(statement.value, constants)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                messages.append(" ".join(text_of(node, constants).split()))
    return messages


def text_of(node, constants):
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return constants.get(node.value.id, "…") if isinstance(node.value, ast.Name) else "…"
    return FILLED_IN.sub("…", str(node.value))


@pytest.mark.parametrize("block", blocks("text"), ids=str)
def test_messages_are_in_the_source(block):
    for message in block.text.splitlines():
        assert any(message in source for source in source_messages()), message


# --- Links and anchors.


@cache
def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them; MkDocs, in its build, checks its own."""
    tokens = tokens_of(page)
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    texts = ["".join(part.content for part in heading.children) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def links(page):
    for token in tokens_of(page):
        for part in token.children or ():
            target = part.attrs.get("href", part.attrs.get("src"))
            if target is not None:
                yield target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.is_file(), link
        assert target.is_relative_to(ROOT), link
        assert not parts.fragment or parts.fragment in anchors(target), link

"""The package's layout: what each part of it may import, and the names that users import."""

import ast
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import hf_xsam

PACKAGE = Path(hf_xsam.__file__).parent
# Folders, and modules at the root: each may import those before it, and what it holds itself.
ORDER = (
    *("functional", "data", "settings_file", "config", "state", "step", "saving", "sharpness", "trainer"),
    *("integrations", "plotting", "cli", "__init__"),
)


def module_name(path):
    """Return the dotted name of the module in a file, a package's for its `__init__.py`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_by(name):
    """Return the package's modules that a module imports, for type checkers alone and within functions too."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, node.module] if node.module else parents)
            # What is imported from a package is a module of it or a name in its __init__.py.
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {each if each in MODULES else origin for each in inner}
    return found & MODULES.keys()


def part_of(name):
    """Return the folder below the package that holds a module, or the module's own name at the root."""
    return name.split(".")[1] if "." in name else "__init__"


def test_imports_are_found():
    assert imported_by("hf_xsam") >= {"hf_xsam.config", "hf_xsam.trainer"}  # for type checkers alone
    assert "hf_xsam.plotting" in imported_by("hf_xsam.cli.plot")  # within a function
    assert "hf_xsam.data" in imported_by("hf_xsam.data.encoding")  # a name in its own package
    assert {part_of(name) for name in MODULES} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_each_part_imports_only_those_before_it(part):
    allowed = ORDER[: ORDER.index(part) + 1]
    imports = [(name, other) for name in MODULES if part_of(name) == part for other in imported_by(name)]
    assert not [f"{name} imports {other}" for name, other in imports if part_of(other) not in allowed]


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({name: imported_by(name) for name in MODULES}).prepare()  # a CycleError names them


@pytest.mark.parametrize("name", hf_xsam.__all__)
def test_what_users_import(name):
    found = getattr(import_module("hf_xsam"), name)
    assert found.__name__ == name
    assert name in dir(hf_xsam)


def test_what_the_package_lacks_is_named():
    with pytest.raises(ImportError, match="cannot import name 'XSAMConfg' from 'hf_xsam'"):
        from hf_xsam import XSAMConfg  # noqa: F401

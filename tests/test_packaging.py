"""What is built and installed: all of the package, from a wheel, a source distribution and a checkout."""

import os
import subprocess
import sys
import sysconfig
from importlib.metadata import PathDistribution
from pathlib import Path
from shutil import copytree, ignore_patterns
from venv import EnvBuilder

import pytest

import hf_xsam

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# The build backend is this environment's, so that nothing is fetched.
INSTALL = ["install", "--no-deps", "--no-index", "--no-build-isolation"]


def command(*words, **settings):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, **settings)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def files_of(package):
    return {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel, made from the source distribution beside it."""
    folder = tmp_path_factory.mktemp("built")
    command(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_all_of_the_package_is_installed(built, tmp_path, kind):
    (archive,) = built.glob(kind)
    command(*PIP, *INSTALL, "--target", tmp_path, archive)
    installed = files_of(tmp_path / "hf_xsam")
    assert installed == files_of(ROOT / "hf_xsam")
    assert {Path("py.typed"), Path("plotting/page.html"), Path("cli/main.py")} <= installed
    (information,) = tmp_path.glob("*.dist-info")
    assert (information / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    distribution = PathDistribution(information)
    assert distribution.version == hf_xsam.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert [script.value for script in distribution.entry_points] == ["hf_xsam.cli.main:main"]


def test_a_checkout_is_imported_from_the_folder_above_it(tmp_path):
    """There the checkout's own name, which is the package's, stands first on the path."""
    checkout = tmp_path / "hf_xsam"
    copytree(ROOT / "hf_xsam", checkout / "hf_xsam", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    EnvBuilder().create(tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    packages = Path(command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "this_environment.pth").write_text(sysconfig.get_path("purelib"))  # torch and the build backend
    command(*PIP, "--python", python, *INSTALL, "--editable", checkout)
    code = "import hf_xsam; from hf_xsam import XSAMConfig; print(hf_xsam.__file__)"
    assert Path(command(python, "-c", code, cwd=tmp_path).strip()) == checkout / "hf_xsam" / "__init__.py"

"""Runs on disk, which the tests of plotting read."""

import shutil

import pytest

from hf_xsam.cli.main import main
from tests.runs_on_disk import trained_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trained_runs(folder)
    return folder


@pytest.fixture
def stock(folder, tmp_path, monkeypatch):
    """A copy of the stock Trainer's run, to damage, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(folder / "stock", tmp_path / "stock")


@pytest.fixture
def refused(capsys):
    """Run the command, which must end with status 2, and return the one line that it prints to stderr."""

    def refuse(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["plot", *map(str, arguments)])
        assert exit.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return refuse

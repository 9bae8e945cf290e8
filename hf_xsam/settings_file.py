"""`xsam_config.json`: where a model's settings are found, in its folder or on the hub, and read."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

CONFIG_NAME = "xsam_config.json"
NOT_WRITTEN = (
    "XSAMTrainer writes it beside each model that it saves. For a model without it, set XSAMConfig's fields yourself."
)


def find_settings_file(
    repo_or_path: str | os.PathLike[str], subfolder: str | None, hub_options: Mapping[str, Any]
) -> Path:
    """Return the path of the file, in a model's folder or downloaded from the hub into the cache.

    Raises:
        OSError: where there is none to be had; the message says what to do.
    """
    if os.path.isdir(repo_or_path):
        path = Path(repo_or_path, subfolder or "", CONFIG_NAME)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. {NOT_WRITTEN}")
        return path
    repo = str(repo_or_path)
    try:
        return Path(hf_hub_download(repo, CONFIG_NAME, subfolder=subfolder, **hub_options))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{CONFIG_NAME} of {repo!r} is not in the local cache, and the hub cannot be reached: check the name "
            "(there is no such folder either), the connection, HF_HUB_OFFLINE and local_files_only."
        ) from error
    except EntryNotFoundError as error:
        where = f"{repo!r} on the hub" if subfolder is None else f"{subfolder!r} in {repo!r} on the hub"
        raise FileNotFoundError(f"There is no {CONFIG_NAME} in {where}. {NOT_WRITTEN}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{repo!r} is not a local folder, and its {CONFIG_NAME} cannot be downloaded from the hub: {reason} "
            "Check the name and the revision; a private or gated model needs `token` or `hf auth login`."
        ) from error


def read_settings_file(path: Path) -> dict[str, Any]:
    """Return what the file holds, unchecked.

    Raises:
        ValueError: for a file that is no JSON object; the message names it and what to do.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}, not an object")
    except ValueError as error:  # JSON's and Unicode's errors are ValueErrors
        raise ValueError(
            f"{path} is damaged ({error}). Write it again with XSAMConfig.save_pretrained, or, if it came from "
            "the hub, download it again with force_download=True."
        ) from error
    return settings

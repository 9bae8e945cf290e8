"""Where and with what a benchmark ran, for its JSON."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "accelerate", "peft", "pytorch-optimizer", "scipy")


def setting() -> dict[str, Any]:
    """Return the versions of Python and of those packages that are installed, the device, and the threads in use."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "python": platform.python_version(),
        **installed(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def installed() -> dict[str, str]:
    """Return the versions of `PACKAGES`, without those that are not there."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

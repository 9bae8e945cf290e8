"""Where and with what a benchmark ran, for its JSON."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "accelerate", "peft", "pytorch-optimizer", "scipy")


def setting() -> dict[str, Any]:
    """Return the versions of Python and packages, the device, and the threads in use."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }

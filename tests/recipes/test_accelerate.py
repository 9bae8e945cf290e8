"""The configurations in recipes/accelerate under `accelerate launch`, on the CPU with two processes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import test_language_models, test_text_classification
from tests.recipes.test_text_classification import RECIPES, flags

texts = test_text_classification.model_and_data
language = test_language_models.model_and_data

LAUNCHED = Path(__file__).parent / "launched.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(configuration, options, *overrides, recipe="text_classification"):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(RECIPES / "accelerate" / f"{configuration}.yaml"), *overrides]
    settings = {"max_steps": "4", "save_strategy": "steps", "save_steps": "2", "logging_steps": "2"}
    return [*launch, str(LAUNCHED), str(RECIPES / f"{recipe}.py"), *flags(options | settings)]


def check(options, processes):
    """Look at the checkpoint of step 2: all processes took part, and X-SAM's state is in it."""
    checkpoint = Path(options["output_dir"]) / "checkpoint-2"
    state = json.loads((checkpoint / "xsam_state.json").read_text())
    assert state["processes"] == processes
    assert state["refreshed_at"] == 1
    assert len(list(checkpoint.glob("rng_state*"))) == processes
    return state


def launched(words, options):
    """Run a command in a shell's words with more options, and return how it ended."""
    options = options | {"max_steps": "2", "save_strategy": "steps", "save_steps": "2", "eigenvalue_samples": "0"}
    return subprocess.run([*words, *flags(options)], capture_output=True, text=True, timeout=300)


def test_the_documented_command_for_cpus_is_distributed(texts, monkeypatch):
    page = (RECIPES.parent / "docs" / "distributed.md").read_text()
    (command,) = [line for line in page.splitlines() if line.startswith("accelerate launch --multi_gpu")]
    assert command.endswith("--use_cpu true")
    monkeypatch.chdir(RECIPES.parent)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    sizes = {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "3"}
    del texts["use_cpu"]  # as the command says it
    result = launched([*words, *command.split()[2:]], texts | sizes)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((Path(texts["output_dir"]) / "checkpoint-2").glob("rng_state*"))) == 2
    assert result.stdout.count("2 processes, effective batch 24") == 1
    assert result.stdout.count("xsam on") == 1


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (["--cpu", "--num_processes", "2"], "`accelerate launch --cpu` starts one process"),
        (
            ["--config_file", RECIPES / "accelerate" / "multi_gpu.yaml", "--num_processes", "2"],
            "has started 2 processes (WORLD_SIZE), and Accelerate uses 1",
        ),
    ],
    ids=["cpu", "multi_gpu"],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="several processes on GPUs know of each other")
def test_processes_that_would_train_alone_are_refused(texts, launch, message):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *map(str, launch)]
    result = launched([*words, str(RECIPES / "text_classification.py")], texts | {"use_cpu": "false"})
    assert result.returncode != 0
    assert message in result.stderr
    assert not Path(texts["output_dir"]).exists()


@pytest.mark.parametrize(
    ("configuration", "processes", "parts"), [("single_gpu_bf16", 1, 1), ("multi_gpu", 2, 1), ("fsdp2", 2, 2)]
)
def test_one_machine(texts, configuration, processes, parts):
    overrides = ["--num_processes", str(processes), "--main_process_port", "0"]
    if configuration == "fsdp2":
        overrides += ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"]  # as the file says
        overrides += ["--fsdp_cpu_ram_efficient_loading", "false"]  # which asks for an accelerator
    result = subprocess.run(command(configuration, texts, *overrides), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert check(texts, processes)["eigenvector_parts"] == parts
    assert (Path(texts["output_dir"]) / "model.safetensors").exists()
    assert "xsam/rayleigh_quotient" in result.stdout
    assert "top_eigenvalue" in result.stdout


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(texts, stage, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    overrides = ["--num_processes", "2", "--main_process_port", "0"]
    arguments = command(f"zero{stage}", texts | {"bf16": "true"}, *overrides)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert check(texts, 2)["eigenvector_parts"] == 2
    assert (Path(texts["output_dir"]) / "model.safetensors").exists()
    assert "xsam/rayleigh_quotient" in result.stdout
    assert "Measure the saved model" in result.stderr  # in place of the final top eigenvalue


def test_two_machines(texts):
    overrides = ["--num_processes", "2", "--main_process_port", free_port()]
    nodes = [
        subprocess.Popen(
            command("multi_node", texts, *overrides, "--machine_rank", str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    check(texts, 2)


def test_adapters(language):
    overrides = ["--num_processes", "2", "--main_process_port", "0"]
    options = language | test_language_models.LORA
    result = subprocess.run(
        command("fsdp2_lora", options, *overrides, recipe="causal_lm"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert check(options, 2)["eigenvector_parts"] == 2
    checkpoint = Path(options["output_dir"]) / "checkpoint-2"
    parts = [load_file(path) for path in checkpoint.glob("xsam_eigenvector-*")]
    assert all("lora_" in name for part in parts for name in part)
    assert (Path(options["output_dir"]) / "adapter_model.safetensors").exists()

"""Run by test_deepspeed.py in each process: trains once for each case of a JSON file; rank 0 saves what came out."""

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from hf_xsam import XSAMConfig
from hf_xsam.functional.tensors import local
from tests.distributed_run import MeanLoss, MeanLossXSAM
from tests.helpers import arguments, examples_of, logs_of
from tests.models import adapted, bert, sentences

# Three classes: the classifier's parameters do not divide by two.
MODELS = {"bert": lambda: bert(num_labels=3), "dropout": lambda: bert(0.1, num_labels=3), "lora": adapted}


def engine_config(stage, bf16, **settings):
    """Return DeepSpeed's configuration; `settings` are of its part `zero_optimization`, or replace other parts."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, "bf16": {"enabled": bf16}, **settings}


def weights_of(trainer):
    """Return copies of the whole trainable weights, by name, on each process."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gathered = nullcontext()
    if any(hasattr(p, "ds_tensor") for p in parameters.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        return {name: p.detach().float().clone() for name, p in parameters.items()}


class Observer(TrainerCallback):
    """Looks whether the passes leave the weights as they were, and counts the engine's steps."""

    def __init__(self):
        self.trainer, self.before, self.restored = None, None, True


def train(case, folder):
    AcceleratorState._reset_state(), GradientState._reset_state(), unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which a trainer before this one has set
    stage, bf16 = case.get("stage", 0), case.get("bf16", False)
    settings = {"deepspeed": engine_config(stage, bf16, **case.get("engine", {}))} if stage else {}
    args = arguments(folder, bf16=bf16, **settings, **case.get("arguments", {}))
    config = case.get("config")
    kind, mine = MeanLoss, {}
    if config is not None:
        kind = MeanLossXSAM
        mine = {"xsam_config": XSAMConfig(**{"log_metrics": "all", **config})}
    model = MODELS[case.get("model", "bert")]()
    trainer = kind(model=model, args=args, train_dataset=examples_of(sentences(case.get("examples", 32))), **mine)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    result = {"weights": weights_of(trainer), "logs": logs_of(trainer)}
    if config is not None and trainer.xsam_state.eigenvector is not None:
        result["held"] = sum(local(part).numel() for part in trainer.xsam_state.eigenvector.values())
        result["eigenvalue"] = trainer.xsam_state.eigenvalue.item()
    return result


def main():
    cases, output = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    results = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = train(case, case.get("folder", folder))
    if PartialState().is_main_process:
        torch.save(results, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

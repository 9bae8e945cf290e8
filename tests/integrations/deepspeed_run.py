"""Run by test_deepspeed.py in each process: trains once for each case of a JSON file; rank 0 saves what came out."""

import json
import os
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from deepspeed.utils import safe_get_full_fp32_param
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from hf_xsam import XSAMCallback, XSAMConfig
from hf_xsam.functional.tensors import local
from hf_xsam.sharpness import top_eigenpair
from tests.distributed_run import MeanLoss, MeanLossXSAM
from tests.helpers import arguments, end_together, examples_of, logs_of
from tests.models import adapted, bert, sentences

# With three classes, parameters do not divide by the number of processes.
MODELS = {
    "bert": lambda: bert(num_labels=3),
    "dropout": lambda: bert(0.1, num_labels=3),
    "lora": adapted,
    "spoilt": lambda: spoilt(bert(num_labels=3)),
}


# One entry a forward pass. No attribute holds it, for X-SAM puts those back that its own passes change.
PASSES = []


class Interrupted(Exception):
    pass


def spoilt(model):
    """Give one of the sentences, which one process has in its batch, a loss that is not finite."""
    bad = sentences(32)["input_ids"][5]

    def spoil(model, args, kwargs, output):
        if (kwargs["input_ids"] == bad).all(1).any():
            output["loss"] = output["loss"] * torch.nan
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    return model


def refusal(attempt):
    """Return what the ValueError says that this raises."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def engine_config(stage, bf16, zero=None, **settings):
    """Return DeepSpeed's configuration; `zero` adds to its part `zero_optimization`, `settings` replace other parts."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **(zero or {})}
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, "bf16": {"enabled": bf16}, **settings}


def trainable(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def computed_with(trainer):
    """Return copies of the whole trainable weights, by name, that the next pass would compute with."""
    parameters = trainable(trainer)
    sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_tensor")]
    with deepspeed.zero.GatheredParameters(sharded):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def trained(trainer):
    """Return the optimizer's own weights, which are in float32 where it has them so."""
    if trainer.is_deepspeed_enabled and trainer.args.bf16:
        return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trainable(trainer).items()}
    return computed_with(trainer)


class Saboteur(TrainerCallback):
    """Interrupts a forward pass, or changes the gradient that the optimizer gets."""

    def __init__(self, interrupt=None, noise=None):
        self.interrupt, self.noise, self.trainer = interrupt, noise, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(self.count)
        if self.noise:
            self.trainer.deepspeed.optimizer.optimizer.register_step_pre_hook(self.disturb)

    def count(self, *args):
        PASSES.append(None)
        if len(PASSES) == self.interrupt:
            raise Interrupted

    def disturb(self, optimizer, *args):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad[0] += self.noise


def train(case, folder):
    AcceleratorState._reset_state(), GradientState._reset_state(), unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which a trainer before this one has set
    stage, bf16, config = case.get("stage", 0), case.get("bf16", False), case.get("config")
    settings = {"deepspeed": engine_config(stage, bf16, **case.get("engine", {}))} if stage else {}
    args = arguments(folder, bf16=bf16, **settings, **case.get("arguments", {}))
    kind, mine = MeanLoss, {}
    if config is not None:
        kind, mine = MeanLossXSAM, {"xsam_config": XSAMConfig(**{"log_metrics": "all", **config})}
    model = MODELS[case.get("model", "bert")]()
    model = model.bfloat16().float() if bf16 else model  # what DeepSpeed's master weights begin with
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    PASSES.clear()
    saboteur = Saboteur(**case.get("sabotage", {}))
    dataset = examples_of(sentences(case.get("examples", 32)))
    trainer = kind(model=model, args=args, train_dataset=dataset, callbacks=[saboteur], **mine)
    saboteur.trainer = trainer
    result = {"start": start}
    try:
        trainer.train(resume_from_checkpoint=case.get("resume"))
    except (Interrupted, RuntimeError) as error:
        if not case.get("sabotage"):
            raise
        result["error"] = str(error)
        result["after"] = computed_with(trainer)
    result |= {"weights": trained(trainer), "logs": logs_of(trainer), "passes": len(PASSES)}
    if config is not None:
        result["skipped"] = trainer.xsam_state.skipped_steps
        if (vector := trainer.xsam_state.eigenvector) is not None:
            result["held"] = sum(local(part).numel() for part in vector.values())
            result["eigenvalue"] = trainer.xsam_state.eigenvalue.item()
    if stage:
        tries = (lambda: top_eigenpair(trainer, [sentences(8)]), lambda: XSAMCallback(trainer))
        result["refused"] = [refusal(attempt) for attempt in tries]
    return result


def main():
    cases, output = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    results = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = train(case, case.get("folder", folder))
    if PartialState().is_main_process:
        torch.save(results, output)
    end_together()


if __name__ == "__main__":
    main()

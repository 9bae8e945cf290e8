"""Run by test_distributed.py in each process: trains once for each case of a JSON file; rank 0 saves what came out."""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_xsam import XSAMCallback, XSAMConfig, XSAMTrainerMixin
from hf_xsam.functional.tensors import is_sharded, local
from hf_xsam.sharpness import MeasureSettings
from hf_xsam.step.scope import trainable_parameters
from tests.helpers import arguments, end_together, examples_of, logs_of, shard_on_cpu
from tests.models import adapted, bert, sentences

MODELS = {
    "bert": bert,
    "dropout": lambda: bert(0.1),
    "lora": adapted,
    "branches": lambda: Branches(),
    "fused": lambda: FusedInOne(),
}


class Branches(nn.Module):
    """Has a head for small and one for large first tokens, each called for those alone, and a third one for none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, input_ids, labels):
        features, kind = self.table(input_ids).mean(1), input_ids[:, 0] // 25
        chosen = [(torch.tanh(self.heads[k](features[kind == k])), labels[kind == k]) for k in kind.unique().tolist()]
        logits, targets = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        return {"loss": nn.functional.cross_entropy(logits, targets)}


class Fused(torch.autograd.Function):
    """Stands for a fused kernel: an operation defined in Python, whose second derivative nobody vouches for."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class FusedInOne(Branches):
    """Has such an operation in process 1 alone."""

    def forward(self, input_ids, labels):
        loss = super().forward(input_ids, labels)["loss"]
        return {"loss": Fused.apply(loss) if PartialState().process_index == 1 else loss}


class MeanLoss(Trainer):
    """For models whose loss is a per-batch mean, though their `forward` accepts `num_items_in_batch`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class MeanLossXSAM(XSAMTrainerMixin, MeanLoss):
    pass


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that gather or scatter something, and the all-reduces of more than one number."""

    def __init__(self):
        super().__init__()
        self.gathers = self.scatters = self.all_reduces = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::"):
            self.gathers += "gather" in func.name()
            self.scatters += "scatter" in func.name()
            self.all_reduces += "allreduce" in func.name() and sum(tensor.numel() for tensor in args[0]) > 1
        return func(*args, **(kwargs or {}))


def whole(tensor):
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach().clone()


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return {name: whole(p) for name, p in trainable_parameters(model).items()}


REDUCED = []  # the gradient all-reduces of DDP; what a callback holds is put back after replays


def count_and_reduce(group, bucket):
    REDUCED.append(1)
    return allreduce_hook(group, bucket)


class Observer(TrainerCallback):
    """Compares the ranks' weights after every step, and has the gradient all-reduces of DDP counted."""

    def __init__(self):
        self.trainer, self.ranks_agree = None, True

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, count_and_reduce)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.is_fsdp_enabled:
            return  # each holds a part
        flat = torch.cat([part.flatten() for part in weights(self.trainer).values()])
        gathered = self.trainer.accelerator.gather(flat).view(args.world_size, -1)
        self.ranks_agree = self.ranks_agree and bool((gathered == gathered[0]).all())


def train(case, folder):
    sharded = case.get("strategy") == "fsdp2"
    AcceleratorState._reset_state(), GradientState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    extra = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}} if sharded else {}
    if "mesh" in case:
        extra["parallelism_config"] = ParallelismConfig(**case["mesh"])
    args = arguments(folder, **extra, **case.get("arguments", {}))
    model = MODELS[case.get("model", "bert")]().to(getattr(torch, case.get("dtype", "float64")))
    observer, config = Observer(), case.get("config")
    mine = (
        {}
        if config is None
        else {"xsam_config": XSAMConfig(**{"log_metrics": "all", "replay_check": "never", **config})}
    )
    trainer = (MeanLoss if config is None else MeanLossXSAM)(
        model=model, args=args, train_dataset=examples_of(sentences(case.get("examples", 32))), callbacks=[observer],
        **({} if sharded else {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2})}), **mine,
    )  # fmt: skip
    observer.trainer = trainer
    if "measure_every" in case:
        settings = MeasureSettings(rhos=[0.05], trace_samples=0, slice_points=0, tolerance=1e-4)
        trainer.add_callback(XSAMCallback(trainer, every=case["measure_every"], samples=8, settings=settings))
    resume = case.get("resume")
    bucket = patch("hf_xsam.step.processes.BUCKET_BYTES", case.get("bucket_bytes", 25 * 2**20))
    REDUCED.clear()
    with CollectiveCounter() as collectives, bucket:
        trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    result = {
        "logs": logs_of(trainer),
        "history": history,
        "weights": weights(trainer),
        "ranks_agree": observer.ranks_agree,
    }
    result |= {"gradient_all_reduces": len(REDUCED), "all_reduces": collectives.all_reduces}
    result |= {"gathers": collectives.gathers, "scatters": collectives.scatters}
    result["units"] = sum(isinstance(module, FSDPModule) for module in model.modules())
    if config is not None and trainer.xsam_state.eigenvector is not None:
        vector = trainer.xsam_state.eigenvector
        result["eigenvector"] = {name: whole(part) for name, part in vector.items()}
        result["held"] = sum(local(part).numel() for part in vector.values())
        gathered = trainer.accelerator.gather(torch.cat([part.flatten() for part in result["eigenvector"].values()]))
        parts = gathered.view(trainer.args.world_size, -1)
        result["ranks_agree"] &= bool((parts == parts[0]).all())
        trainer.evaluate(examples_of(sentences(4)))  # after which FSDP2 holds some parameters whole
        result["top_eigenvalue"] = trainer.top_eigenpair([sentences(8, seed=2)], iterations=4)[1]
        result["method"] = trainer._xsam_steps.method
        result["eigenvalue"], result["step"] = trainer.xsam_state.eigenvalue.item(), trainer.xsam_state.step
    return result


def main():
    cases, output = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    results = {}
    shard_on_cpu()
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = train(case, case.get("folder", folder))
    if PartialState().is_main_process:
        torch.save(results, output)
    end_together()


if __name__ == "__main__":
    main()

"""What a step costs a GPU beyond the stock Trainer's: memory, and waits of the host for the device."""

import gc
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer

import hf_xsam
from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.step.moving_weights import WATCHED_STEPS
from tests.gpu.helpers import gpu_arguments
from tests.helpers import examples_of
from tests.models import Smooth, bert, points, sentences

STEADY = {"rho": 0.05, "eigen_interval": 2, "eigen_warmup_steps": 0}


class TestMemory:
    """The peak over the stock Trainer's, in copies of the trainable weights."""

    SIZES = {"vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 2048}

    @classmethod
    def peak(cls, config, folder, rows, length):
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        batch = {"input_ids": torch.randint(0, 1000, (2 * rows, length)), "labels": torch.randint(0, 2, (2 * rows,))}
        args = gpu_arguments(
            folder, max_steps=3, per_device_train_batch_size=rows, optim="adamw_torch_fused", logging_steps=10
        )
        settings = {"args": args, "train_dataset": examples_of(batch)}
        model = BertForSequenceClassification(BertConfig(**cls.SIZES, num_attention_heads=8))
        trainer = Trainer(model, **settings) if config is None else XSAMTrainer(model, **settings, xsam_config=config)
        trainer.train()
        copy = sum(parameter.nbytes for parameter in model.parameters())
        return (torch.cuda.max_memory_allocated() - before) / copy

    # Beside few activations the most is held between the passes, see docs/scaling.md, beside many in the second pass.
    @pytest.mark.parametrize(
        ("rows", "length", "sam", "xsam"), [(2, 8, 2.1, 3.3), (64, 64, 1.1, 2.3)], ids=["weights", "activations"]
    )
    def test_copies_of_the_weights(self, tmp_path, rows, length, sam, xsam):
        self.peak(None, tmp_path, rows, length)  # the first run takes cuBLAS's workspaces too
        stock = self.peak(None, tmp_path, rows, length)
        assert stock > 4  # weights, gradients, AdamW's two moments
        assert self.peak(XSAMConfig(rho=0.05, alpha=0.0), tmp_path, rows, length) - stock < sam
        assert self.peak(XSAMConfig(**{**STEADY, "eigen_interval": 1}), tmp_path, rows, length) - stock < xsam


@contextmanager
def synchronizations():
    """Yield a list that holds, once the block is left, where the host waited for the device: file and line."""
    places = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    places += [f"{warning.filename}:{warning.lineno}" for warning in waits]


class Counting:
    """Notes for each training step where it waited."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.waits = []

    def training_step(self, *args, **kwargs):
        with synchronizations() as places:
            loss = super().training_step(*args, **kwargs)
        self.waits.append(places)
        return loss

    def create_optimizer(self, *args, **kwargs):
        if self.accelerator.scaler is not None:  # one that no step is skipped with
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
        return super().create_optimizer(*args, **kwargs)


class CountingStock(Counting, Trainer):
    pass


class CountingXSAM(Counting, XSAMTrainer):
    pass


def test_waits_are_seen():
    with synchronizations() as places:
        torch.ones((), device="cuda").item()
    assert len(places) == 1
    assert Path(places[0].rpartition(":")[0]) == Path(__file__)


@pytest.mark.parametrize("precision", [{}, {"fp16": True}], ids=["float32", "float16"])
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize(("build", "data"), [(Smooth, points), (bert, sentences)])
def test_waits_of_a_step(tmp_path, build, data, hvp, precision):
    """SAM's: one, whether gradient and loss are finite. A refresh: whether g is, and whether its products were.

    The first steps wait more: the first one chooses the kind of product, for which it looks at every parameter's second
    derivative, and each of `WATCHED_STEPS` reads twice what weights the passes move.
    """
    settings = {"args": gpu_arguments(tmp_path, num_train_epochs=2, **precision), "train_dataset": examples_of(data())}
    stock = CountingStock(build(), **settings)
    ours = CountingXSAM(build(), **settings, xsam_config=XSAMConfig(**STEADY, eigen_batch_fraction=1.0, hvp=hvp))
    stock.train(), ours.train()
    assert len(stock.waits) == len(ours.waits) == 8 > 4 > WATCHED_STEPS
    package = str(Path(hf_xsam.__file__).parent)
    own = [[place for place in places if place.startswith(package)] for places in ours.waits]
    assert [len(places) for places in own[4:]] == [3, 1, 3, 1], own[4:]
    for step, count in zip(range(4, 8), (3, 2, 3, 2), strict=True):
        of_models = len(stock.waits[step]) * count
        assert len(ours.waits[step]) == len(own[step]) + of_models, (ours.waits[step], stock.waits[step])

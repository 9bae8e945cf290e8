"""Runs of the stock Trainer, SAM and X-SAM on a tiny model, as `hf-xsam plot` finds them on disk."""

import numpy as np
import torch
from transformers import Trainer

from hf_xsam import XSAMCallback, XSAMConfig, XSAMTrainer
from hf_xsam.sharpness import MeasureSettings, measure
from tests.cases import tiny_vit
from tests.helpers import arguments, examples_of


def accuracy(prediction):
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def trained_runs(folder):
    """Train `stock`, `sam` and `xsam` in `folder`, six steps each, and leave there what the recipes leave.

    `stock` and `xsam` are measured along the way, `sam` and `xsam` after training.
    """
    for name in ("stock", "sam", "xsam"):
        torch.manual_seed(0)
        model, batch = tiny_vit()
        settings = {
            "model": model,
            "args": arguments(folder / name, eval_strategy="steps", eval_steps=1, num_train_epochs=3),
            "train_dataset": examples_of(batch),
            "eval_dataset": examples_of(batch),
            "compute_metrics": accuracy,
        }
        if name == "stock":
            trainer = Trainer(**settings)
        else:
            xsam_config = XSAMConfig(alpha=0.0 if name == "sam" else 0.2, eigen_interval=1)
            trainer = XSAMTrainer(**settings, xsam_config=xsam_config)
        if name != "sam":
            trainer.add_callback(XSAMCallback(trainer, every=2 if name == "stock" else 3))
        metrics = trainer.train().metrics
        tested = trainer.evaluate(metric_key_prefix="test")
        trainer.save_state()
        trainer.save_metrics("all", metrics | tested)
        trainer.save_model()
        if name != "stock":
            settings = MeasureSettings(top_k=2, slice_points=3)
            measure(model, [batch], settings, progress=False).save(folder / name)

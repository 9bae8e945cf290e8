"""Runs of the stock Trainer, SAM and X-SAM on a tiny model, as `hf-xsam plot` finds them on disk."""

import json

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from hf_xsam import XSAMConfig, XSAMTrainer

from .cases import tiny_vit
from .helpers import arguments, examples_of

DISTANCES = [-0.5, -0.25, 0.0, 0.25, 0.5]
SHARPNESS = {
    "model": "tiny",
    "loss": 1.234,
    "gradient_norm": 0.5,
    "eigenvalues": [12.5, -0.0025],
    "gradient_angles_degrees": [56.0, 89.0],
    "trace": {"mean": 20.0, "standard_error": 3.0, "samples": 8},
    "sam_sharpness": {"0.05": 0.01},
    "slices": {
        "eigenvector": {"distances": DISTANCES, "losses": [2.5, 1.5, 1.2, 1.6, 2.7]},
        "gradient": {"distances": DISTANCES, "losses": [1.0, 1.1, 1.2, 1.4, 1.7]},
    },
    "settings": {"targets": 512},
    "versions": {"torch": "2.13.0"},
}


class LogsEigenvalue(TrainerCallback):
    """Measures the top eigenvalue after every second step, and logs it."""

    def __init__(self, batches):
        self.batches = batches

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 2 == 0:
            # args of its own: the trainer that measures must not touch the one that trains
            measuring = XSAMTrainer(model=model, args=arguments(args.output_dir), xsam_config=XSAMConfig())
            value = measuring.top_eigenpair(self.batches, iterations=2)[1]
            state.log_history.append({"step": state.global_step, "sharpness/top_eigenvalue": value})


def accuracy(prediction):
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def trained_runs(folder):
    """Train `stock`, `sam` and `xsam` in `folder`, six steps each; the last two have a `sharpness.json` as well."""
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
            trainer = Trainer(**settings, callbacks=[LogsEigenvalue([batch])])
        else:
            trainer = XSAMTrainer(
                **settings, xsam_config=XSAMConfig(alpha=0.0 if name == "sam" else 0.2, eigen_interval=1)
            )
        trainer.train()
        trainer.save_state()
        if name != "stock":
            (folder / name / "sharpness.json").write_text(json.dumps(SHARPNESS))

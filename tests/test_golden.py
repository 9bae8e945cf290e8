"""The paper authors' own update, step by step: `data/*.json` holds trajectories of their functions."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_xsam import XSAMConfig, XSAMTrainer

GOLDEN = Path(__file__).parent / "golden"


class Classifier(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dims[0], dims[1]), nn.Tanh(), nn.Linear(dims[1], dims[2]))

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class InOrder(torch.utils.data.IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


class Recorder(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())


@pytest.mark.parametrize("name", ["paper_sgd", "paper_adamw"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_every_step_matches_the_authors(name, micro_batches, tmp_path):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    model = Classifier(golden["dims"]).double()
    model.layers.load_state_dict({k: torch.tensor(v, dtype=torch.double) for k, v in golden["init"].items()})
    examples = [
        {"x": torch.tensor(x, dtype=torch.double), "labels": torch.tensor(y)}
        for batch in golden["batches"]
        for x, y in zip(batch["x"], batch["y"], strict=True)
    ]
    size = len(golden["batches"][0]["x"])
    if golden["optimizer"] == "SGD":
        settings = {key: golden[key] for key in ("lr", "momentum", "weight_decay")}
    else:
        settings = {key: golden[key] for key in ("lr", "weight_decay")}
    optimizer = getattr(torch.optim, golden["optimizer"])(model.parameters(), **settings)
    trainer = XSAMTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=tmp_path,
            max_steps=len(golden["steps"]),
            per_device_train_batch_size=size // micro_batches,
            gradient_accumulation_steps=micro_batches,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
            remove_unused_columns=False,
        ),
        train_dataset=InOrder(examples),
        optimizers=(optimizer, None),
        callbacks=[recorder := Recorder()],
        xsam_config=XSAMConfig.paper(
            rho=golden["rho"],
            alpha=golden["alpha"],
            eigen_interval=golden["freq"],
            power_iterations=golden["power_steps"],
            hvp="exact",
            log_metrics="all",
        ),
    )
    start = torch.tensor(golden["v_init"], dtype=torch.double)
    sizes = [p.numel() for p in model.parameters()]
    trainer.xsam_state.eigenvector = {
        key: part.view_as(p) for (key, p), part in zip(model.named_parameters(), start.split(sizes), strict=True)
    }
    trainer.train()

    assert len(recorder.weights) == len(golden["steps"])
    logs = [line for line in trainer.state.log_history if "loss" in line]
    for weights, step, log in zip(recorder.weights, golden["steps"], logs, strict=True):
        torch.testing.assert_close(weights, torch.tensor(step["weights_after"], dtype=torch.double), rtol=0, atol=1e-9)
        for ours, theirs in {
            "xsam/gradient_norm": "grad_norm",
            "xsam/perturbed_gradient_norm": "perturbed_grad_norm",
            "xsam/perturbed_loss": "perturbed_loss",
            "xsam/cosine": "cosine",
        }.items():
            if theirs in step and step[theirs] is not None:
                assert log[ours] == pytest.approx(step[theirs], abs=1e-9)
            else:
                assert ours not in log
    last = nn.utils.parameters_to_vector([trainer.xsam_state.eigenvector[key] for key, _ in model.named_parameters()])
    torch.testing.assert_close(
        last, torch.tensor(golden["steps"][-1]["eigenvector"], dtype=torch.double), rtol=0, atol=1e-9
    )

"""What X-SAM holds at most beside the stock Trainer's weights, gradients and optimizer, in copies of the weights."""

import pytest
import torch
from memory import peak_tensor_memory
from torch import nn
from transformers import Trainer

from hf_xsam import XSAMConfig, XSAMTrainer
from tests.helpers import arguments, examples_of
from tests.models import points


class Wide(nn.Module):
    """Of many weights and few activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 3))

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


def peak(folder, config=None):
    model = Wide()
    settings = {"args": arguments(folder, max_steps=3), "train_dataset": examples_of(points())}
    settings["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, {"lr": 1e-3})
    trainer = Trainer(model, **settings) if config is None else XSAMTrainer(model, **settings, xsam_config=config)
    return peak_tensor_memory(trainer.train) / sum(parameter.nbytes for parameter in model.parameters())


# SAM's copy of the weights takes the place of what AdamW's step takes for itself. A refresh holds v, the next v and the
# gradient's graph, which is of the weights' size where activations are few.
@pytest.mark.parametrize(
    ("config", "copies"),
    [
        (XSAMConfig(alpha=0.0, replay_check="never"), 0),
        (XSAMConfig(eigen_interval=1, replay_check="never"), 3),
        (XSAMConfig.one_pass(0.1, eigen_interval=1, replay_check="never"), 3),
    ],
    ids=["SAM", "X-SAM", "one pass"],
)
def test_copies_of_the_weights(tmp_path, config, copies):
    assert peak(tmp_path, config) - peak(tmp_path) == pytest.approx(copies, abs=0.3)

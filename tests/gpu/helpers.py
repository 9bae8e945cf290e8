"""Runs on the GPU, and tiny models whose operations are its fused kernels and cuDNN's."""

from functools import partial

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_xsam import XSAMConfig, XSAMTrainer
from tests.helpers import arguments, run
from tests.models import SIZES, sentences

# Heads of 32, which every kernel of attention takes.
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 64}

gpu_arguments = partial(arguments, use_cpu=False)
gpu_run = partial(run, use_cpu=False)


def wide_bert(attention="sdpa"):
    torch.manual_seed(0)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": attention}
    return BertForSequenceClassification(BertConfig(**WIDE, **settings))


def wide_llama(attention="sdpa"):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**WIDE, pad_token_id=0, attn_implementation=attention))


def unpadded_text(count=16):
    ids = sentences(count)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def labels(count, generator):
    return torch.randint(0, 3, (count,), generator=generator)


class Convolutions(nn.Module):
    """Of images of 8 x 8, to 3 classes. The mean over the places: adaptive pooling has no deterministic kernel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.head(self.features(x).mean((2, 3))), labels)}


class Recurrent(nn.Module):
    """Of sequences of 5 points in 6 dimensions, to 3 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x, labels):
        states, _ = self.lstm(x)
        return {"loss": nn.functional.cross_entropy(self.head(states[:, -1]), labels)}


def images(count=16):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(count, 1, 8, 8, generator=generator), "labels": labels(count, generator)}


def sequences(count=16):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(count, 5, 6, generator=generator), "labels": labels(count, generator)}


def top_eigenpair(model, batch, folder, config=None, iterations=100, **settings):
    """Return the eigenvector, flat and on the CPU, and the eigenvalue, of the loss on `batch`."""
    trainer = XSAMTrainer(model=model, args=arguments(folder, **settings), xsam_config=config or XSAMConfig())
    vector, value, _ = trainer.top_eigenpair([batch], iterations)
    return torch.cat([part.flatten() for part in vector.values()]).cpu(), value


def is_finite(state):
    """Return whether the eigenpair of X-SAM's state is."""
    return all(torch.isfinite(part).all() for part in [state.eigenvalue, *state.eigenvector.values()])

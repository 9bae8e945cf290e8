"""Tiny models with a batch each, for tests over several architectures."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_bert():
    model = BertForSequenceClassification(BertConfig(vocab_size=99, max_position_embeddings=32, **SIZES))
    return model, {"input_ids": torch.randint(0, 99, (8, 12)), "labels": torch.randint(0, 2, (8,))}


def tiny_vit():
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES))
    return model, {"pixel_values": torch.randn(8, 1, 8, 8), "labels": torch.randint(0, 10, (8,))}


def tiny_llama():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, max_position_embeddings=32, **SIZES))
    ids = torch.randint(0, 99, (8, 12))
    return model, {"input_ids": ids, "labels": ids}


TRANSFORMERS = [tiny_bert, tiny_vit, tiny_llama]


def tanh_network():
    """Return a float64 network, and a function that computes its loss on fixed data."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 4, dtype=torch.double), torch.randint(0, 3, (12,))
    return network, lambda part=slice(None): nn.functional.cross_entropy(network(x[part]), y[part])

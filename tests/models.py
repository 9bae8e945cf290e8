"""The tiny models that tests train, each with a batch of its own."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_xsam import XSAMTrainer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
TARGETS = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}


def bert(dropout=0.0, seed=0, **settings):
    torch.manual_seed(seed)
    probabilities = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**SIZES, **probabilities, **settings))


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0))


def sentences(count=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (count, 8), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 2, (count,), generator=generator)}


def padded_text(count=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (count, 8), generator=generator)
    lengths = torch.randint(2, 9, (count, 1), generator=generator)
    mask = torch.arange(8) < lengths
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}


class MeanLossTrainer(XSAMTrainer):
    """For models whose loss is a per-batch mean, though their `forward` accepts `num_items_in_batch`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class BatchNormClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class Smooth(nn.Module):
    """Of points in 6 dimensions, to 3 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


def points(count=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return {"x": x, "labels": torch.randint(0, 3, (count,), generator=generator)}


def adapted(kind=LoraConfig, **settings):
    """A tiny BERT with adapters, and the classifier trained beside them."""
    settings = {**TARGETS, **({"r": 2} if kind is LoraConfig else {}), **settings}
    model = bert().to(settings.pop("dtype", torch.float32))
    torch.manual_seed(3)
    return get_peft_model(model, kind(**settings))

"""The models that are timed on a GPU: BERT-base, ViT-B/16 and a Llama of 1.2 billion weights, all random ones."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from workload import SEED, Workload

# Llama 3.2 1B's.
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def repeated(build: Callable[[], nn.Module], batch: Mapping[str, Tensor], rho: float = 0.01) -> Workload:
    """Return how a model, built where it trains, learns `batch` again and again, by AdamW under bf16 autocast."""
    size = len(next(iter(batch.values())))

    def model() -> nn.Module:
        set_seed(SEED)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return build()

    examples = [{name: column[i] for name, column in batch.items()} for i in range(size)]
    settings = {"bf16": True, "learning_rate": 1e-5, "optim": "adamw_torch_fused"}
    return Workload(model, examples * 50, None, rho, batch_size=size, reference_size=0, optimizer=settings)


def tokens(rows: int, length: int, vocabulary: int) -> Tensor:
    """Return random ones."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(SEED))


def bert() -> Workload:
    """Return BERT-base, 110 million weights, on 32 texts of 128 tokens."""
    ids = tokens(32, 128, BertConfig().vocab_size)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(32) % 2}
    return repeated(lambda: BertForSequenceClassification(BertConfig()), batch)


def vit() -> Workload:
    """Return ViT-B/16, 86 million weights, on 64 images of 224 x 224."""
    pixels = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
    batch = {"pixel_values": pixels, "labels": torch.arange(64) % 10}
    return repeated(lambda: ViTForImageClassification(ViTConfig(num_labels=10)), batch)


def llama(dtype: torch.dtype = torch.float32, lora: bool = False) -> Workload:
    """Return the Llama on 4 texts of 512 tokens, without gradient checkpointing.

    Args:
        dtype: of its weights.
        lora: train adapters of rank 16, which PEFT keeps in float32, on all linear layers, and nothing else.
    """

    def build() -> nn.Module:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype=dtype)
        return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")) if lora else model

    ids = tokens(4, 512, LLAMA["vocab_size"])
    return repeated(build, {"input_ids": ids, "labels": ids})


WORKLOADS = {
    "bert": bert,
    "vit": vit,
    "llama": llama,
    "llama-lora": partial(llama, torch.bfloat16, lora=True),
    "llama-bf16": partial(llama, torch.bfloat16),
}

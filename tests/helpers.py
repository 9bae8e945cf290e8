"""Short runs of a trainer on a tiny model, and their weights."""

import os
from dataclasses import replace

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_xsam import XSAMTrainer

PLAIN = {"rho": 0.0, "alpha": 0.0}


def arguments(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**settings, **overrides})


def examples_of(batch):
    """Split a batch into the examples that the default collator puts together again."""
    size = len(next(iter(batch.values())))
    return [{name: column[i] for name, column in batch.items()} for i in range(size)]


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def run(model, batch, folder, xsam_config=None, trainer_class=None, callbacks=None, optimizer="SGD", **overrides):
    """Train `model` on `batch`, by X-SAM if there is an `xsam_config`, and return the trainer."""
    settings = {"optimizer_cls_and_kwargs": (getattr(torch.optim, optimizer), {"lr": 1e-2})}
    for name in ("compute_loss_func", "model_init"):
        if name in overrides:
            settings[name] = overrides.pop(name)
    if xsam_config is not None:
        settings["xsam_config"] = replace(xsam_config, log_metrics="all")
    if "model_init" not in settings:
        settings["model"] = model
    trainer_class = trainer_class or (Trainer if xsam_config is None else XSAMTrainer)
    trainer = trainer_class(
        args=arguments(folder, **overrides), train_dataset=examples_of(batch), callbacks=callbacks, **settings
    )
    trainer.train()
    return trainer


def logs_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def shard_on_cpu():
    """Let Accelerate, which shards on accelerators alone, take the CPU for one where a run asks for FSDP."""
    set_up = AcceleratorState.__init__

    def set_up_for_sharding(self, *args, **kwargs):
        state = PartialState._shared_state
        if state.get("distributed_type") in (DistributedType.MULTI_CPU, DistributedType.MULTI_XPU):
            sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
            state["distributed_type"] = DistributedType.MULTI_XPU if sharded else DistributedType.MULTI_CPU
        set_up(self, *args, **kwargs)

    AcceleratorState.__init__ = set_up_for_sharding


class WeightRecorder(TrainerCallback):
    """Keeps the weights at the start and at the end of every optimizer step's gradient computation."""

    def __init__(self):
        self.before, self.after_gradient = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(weights_of(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.after_gradient.append(weights_of(model))


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = ["good", "fine", "great", "bad", "poor", "dull", "film", "plot", "a", "the", "positive", "negative", ":"]


def save_tiny_language_model(folder):
    """Save a Llama of two small layers, and a tokenizer of `WORDS`, as a hub model is laid out."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, **tokens)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def save_tiny_classifier(folder, **config):
    """Save a BERT of one small layer and a tokenizer of `WORDS`, and return the model."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **TINY, **config))
    model.save_pretrained(folder)
    return model


def save_tiny_image_classifier(folder, classes):
    """Save a ViT of one small layer for images of 8 x 8 pixels and its image processor, and return the model."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=classes, **TINY))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return model


def end_together():
    """End a script's processes once all of them have come here: one that leaves early may abort the others."""
    if PartialState().use_distributed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

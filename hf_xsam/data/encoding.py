"""Encode batches of rows as model inputs. Each function is for `Dataset.map` or `Dataset.set_transform`."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL.Image import Image
from transformers import PreTrainedTokenizerBase

from . import IGNORED


def encode_texts(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    text_pair_column: str | None,
    label_column: str,
    number_of: Mapping[Any, int],
    max_length: int,
) -> dict[str, list]:
    """Tokenize texts, or pairs of texts, truncated to `max_length`, and add the number of their class as `labels`."""
    texts = [_texts(batch, column) for column in (text_column, text_pair_column) if column]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return {**encoded, "labels": _numbers(batch, label_column, number_of)}


def encode_images(
    batch: Mapping[str, list],
    processor: Any,
    image_column: str,
    label_column: str,
    number_of: Mapping[Any, int],
    change: Callable[[Any], Any] = lambda image: image,
) -> dict[str, Any]:
    """Return the pixels of images, after `change`, and the number of their class as `labels`."""
    if wrong := [image for image in batch[image_column] if not isinstance(image, Image)]:
        raise ValueError(
            f"Column {image_column!r} holds a {type(wrong[0]).__name__}, not an image: remove such rows, or cast a "
            "column of paths with cast_column(..., datasets.Image())."
        )
    images = [change(image.convert("RGB")) for image in batch[image_column]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": _numbers(batch, label_column, number_of)}


def encode_language(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str] | tuple[str, str],
    max_length: int | None,
) -> dict[str, list]:
    """Tokenize texts, or prompts and completions, for a language model; return `input_ids` and `labels`.

    Each row ends with the end-of-sequence token. A text that is too long is cut at its end, a prompt with its
    completion at the beginning.

    Args:
        batch: columns of texts.
        tokenizer: the model's tokenizer.
        columns: name of the text column, or of the prompt and the completion column. Prompt tokens are labelled -100.
        max_length: maximum number of tokens in a row; None does not truncate.
    """
    end = [tokenizer.eos_token_id]
    if len(columns) == 1:
        ids = [(row + end)[:max_length] for row in tokenizer(_texts(batch, columns[0]))["input_ids"]]
        return {"input_ids": ids, "labels": ids}
    prompts = tokenizer(_texts(batch, columns[0]))["input_ids"]
    completions = tokenizer(_texts(batch, columns[1]), add_special_tokens=False)["input_ids"]
    pairs = list(zip(prompts, completions, strict=True))
    last = slice(-max_length if max_length else None, None)
    return {
        "input_ids": [(prompt + completion + end)[last] for prompt, completion in pairs],
        "labels": [([IGNORED] * len(prompt) + completion + end)[last] for prompt, completion in pairs],
    }


def _numbers(batch: Mapping[str, list], column: str, number_of: Mapping[Any, int]) -> list[int]:
    if wrong := [value for value in batch[column] if value not in number_of]:
        raise ValueError(f"Column {column!r} holds {wrong[0]!r}, which is not a class of the training data.")
    return [number_of[value] for value in batch[column]]


def _texts(batch: Mapping[str, list], column: str) -> list[str]:
    if wrong := [text for text in batch[column] if not isinstance(text, str)]:
        raise ValueError(f"Column {column!r} holds {wrong[0]!r}, not a text: remove such rows.")
    return batch[column]

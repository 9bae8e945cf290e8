"""Encode batches of rows as model inputs. Each function is for `Dataset.map` or `Dataset.set_transform`."""

from collections.abc import Callable, Mapping
from itertools import chain, takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from . import IGNORED, TARGETS
from .checks import InputError, is_messages, require_end_of_text, shown


def encode_texts(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    text_pair_column: str | None,
    max_length: int,
) -> dict[str, list]:
    """Tokenize texts, or pairs of texts, truncated to `max_length`; `labels` stay as they are."""
    texts = [_texts(batch, column) for column in (text_column, text_pair_column) if column]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return {**encoded, TARGETS: batch[TARGETS]}


def encode_images(
    batch: Mapping[str, list],
    processor: Any,
    image_column: str,
    change: Callable[[Any], Any] = lambda image: image,
) -> dict[str, Any]:
    """Return the pixels of images, after `change`; `labels` stay as they are."""
    images = [change(image.convert("RGB")) for image in batch[image_column]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, TARGETS: batch[TARGETS]}


def encode_language(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str] | tuple[str, str],
    max_length: int | None,
) -> dict[str, list]:
    """Tokenize texts, or prompts and completions, for a language model; return `input_ids` and `labels`.

    Each may also be a conversation, a list of messages with a `role` and a `content`, which goes through the
    tokenizer's chat template. A row of texts ends with the end-of-sequence token, one of messages as the template ends
    it. A row that is too long is cut at its end, a prompt with its completion at the beginning.

    Args:
        batch: columns of texts or of messages.
        tokenizer: the model's tokenizer.
        columns: name of the text column, or of the prompt and the completion column. Prompt tokens are labelled -100.
        max_length: maximum number of tokens in a row; None does not truncate.

    Raises:
        InputError: for a row that is neither, messages without a chat template or that it does not take, and texts
            without an end-of-sequence token.
    """
    tokenize = _tokenized_messages if isinstance(batch[columns[0]][0], list) else _tokenized_texts
    rows, starts = tokenize(batch, tokenizer, columns)
    if len(columns) == 1:
        ids = [row[:max_length] for row in rows]
        return {"input_ids": ids, "labels": ids}
    last = slice(-max_length if max_length else None, None)
    return {
        "input_ids": [row[last] for row in rows],
        "labels": [([IGNORED] * start + row[start:])[last] for row, start in zip(rows, starts, strict=True)],
    }


def _tokenized_texts(
    batch: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...]
) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of each row, of all its columns, and how many of them are before the last column's."""
    require_end_of_text(tokenizer, tokenizer.name_or_path)
    end = [tokenizer.eos_token_id]
    first = tokenizer(_texts(batch, columns[0]))["input_ids"]
    if len(columns) == 1:
        return [row + end for row in first], [0] * len(first)
    completions = tokenizer(_texts(batch, columns[1]), add_special_tokens=False)["input_ids"]
    rows = [prompt + completion + end for prompt, completion in zip(first, completions, strict=True)]
    return rows, [len(prompt) for prompt in first]


def _tokenized_messages(
    batch: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...]
) -> tuple[list[list[int]], list[int]]:
    """Return the same of rows of messages; the template's opening of the answer counts for the prompt."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"Column {columns[0]!r} holds messages, and the tokenizer has no chat template: use a chat model, set "
            "tokenizer.chat_template and save it, or choose a column of texts."
        )
    parts = [_messages(batch, column) for column in columns]
    try:
        rows = _through_template(tokenizer, [list(chain(*row)) for row in zip(*parts, strict=True)])
        if len(columns) == 1:
            return rows, [0] * len(rows)
        prompts = _through_template(tokenizer, parts[0], add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"Column {columns[0]!r} holds messages that the chat template refuses: {error}") from error
    return rows, [_shared(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]


def _through_template(tokenizer: Any, conversations: list[list[dict]], **options: Any) -> list[list[int]]:
    return tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)["input_ids"]


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens the two have in common at their beginnings."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _messages(batch: Mapping[str, list], column: str) -> list[list[dict]]:
    for row in batch[column]:
        if not is_messages(row):
            raise InputError(f"Column {column!r} holds {shown(row)}, not messages with a role: remove such rows.")
    return batch[column]


def _texts(batch: Mapping[str, list], column: str) -> list[str]:
    if wrong := [text for text in batch[column] if not isinstance(text, str)]:
        raise InputError(f"Column {column!r} holds {shown(wrong[0])}, not a text: remove such rows.")
    return batch[column]

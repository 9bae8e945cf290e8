"""The columns of a data set, as options of the recipes and of `hf-xsam sharpness`.

There is a class for each kind of data. Its method returns the function that encodes the columns named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset

from .checks import InputError, require_columns, require_images, require_texts
from .encoding import encode_images, encode_language, encode_texts

MESSAGES = "messages"  # what the column of conversations is called in TRL's formats


@dataclass
class TextColumns:
    """The columns of texts, or of pairs of them, and of their labels."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text, if any."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    max_length: int = field(default=128, metadata={"help": "Maximum number of tokens; longer texts are truncated."})

    def text_encoder(self, split: Dataset, where: str = "the data") -> Callable[..., dict[str, list]]:
        """Return what turns a batch of texts and `labels`, with `tokenizer` given by name, into tokens and labels.

        Args:
            split: data whose columns are to be read.
            where: names its file, for errors.

        Raises:
            InputError: if the split lacks a column, or a row a text.
        """
        columns = [self.text_column, self.text_pair_column] if self.text_pair_column else [self.text_column]
        require_columns(split, where, text_column=self.text_column, text_pair_column=self.text_pair_column or None)
        require_texts(split, where, *columns)
        return partial(
            encode_texts,
            text_column=self.text_column,
            text_pair_column=self.text_pair_column,
            max_length=self.max_length,
        )


@dataclass
class ImageColumns:
    """The columns of images and of their classes."""

    image_column: str = field(default="image", metadata={"help": "Column of the image."})
    label_column: str = field(default="label", metadata={"help": "Column of the label: an integer or a string."})

    def image_encoder(self, split: Dataset, where: str = "the data") -> Callable[..., dict[str, Any]]:
        """Return what turns a batch of images and `labels`, with `processor` given by name, into pixels and labels.

        Args:
            split: data whose columns are to be read, among them that of `with_rows`.
            where: names its file or folder, for errors.

        Raises:
            InputError: if the split lacks a column, or a row an image that can be read.
        """
        require_columns(split, where, image_column=self.image_column)
        require_images(split, where, self.image_column)
        return partial(encode_images, image_column=self.image_column)


@dataclass
class LanguageColumns:
    """The columns of texts, or of prompts and completions, for a causal language model.

    Each may hold messages too, which the tokenizer's chat template makes texts of.
    """

    text_column: str = field(
        default="text",
        metadata={"help": "Column of the text, or of a chat's messages; if there is no 'text', 'messages' is read."},
    )
    completion_only_loss: bool = field(
        default=False,
        metadata={"help": "For a language model: compute the loss of completions given prompts, not of texts."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompt, a text or messages."})
    completion_column: str = field(
        default="completion", metadata={"help": "Column of the completion, a text or messages."}
    )
    max_length: int = field(default=512, metadata={"help": "Maximum number of tokens; longer texts are truncated."})

    def language_encoder(self, split: Dataset, where: str = "the data") -> Callable[..., dict[str, list]]:
        """Return what turns a batch of texts or messages, with `tokenizer` given by name, into tokens and labels.

        Raises:
            InputError: if the split lacks a column, has prompts and completions that were not asked for, or has a row
                without texts or messages.
        """
        options = ("prompt_column", "completion_column") if self.completion_only_loss else ("text_column",)
        columns = {option: getattr(self, option) for option in options}
        names = split.column_names
        if columns == {"text_column": "text"} and "text" not in names:
            if MESSAGES in names:
                columns["text_column"] = MESSAGES
            elif self.prompt_column in names and self.completion_column in names:
                raise InputError("The data has prompts and completions, and no texts: pass completion_only_loss.")
        require_columns(split, where, **columns)
        require_texts(split, where, *columns.values(), messages=True)
        return partial(encode_language, columns=tuple(columns.values()), max_length=self.max_length)

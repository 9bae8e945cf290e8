"""Reads the package's docstrings, which follow Hugging Face's conventions, into the API reference."""

import re
from typing import Any

import griffe

# [`name`], [`~package.name`]: a link to what it names, which is written without its package.
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\[|\()")
# A "<" outside of code, as in <u, v>, which Markdown would take for HTML.
CODE_OR_ANGLE = re.compile(r"(`+[^`]*`+)|<")
# name (`type`, *optional*, defaults to 1): the signature says the same.
TYPED_PARAMETER = re.compile(r"^( +\w+) \(\[?`[^()]*\):", re.MULTILINE)
TITLED_PARAMETERS = re.compile(r"^Parameters that ([\w ]+):$", re.MULTILINE)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites each docstring before Griffe parses it in Google's style."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = TITLED_PARAMETERS.sub(r"Parameters: Parameters that \1", obj.docstring.value)
            text = TYPED_PARAMETER.sub(r"\1:", text)
            text = CODE_OR_ANGLE.sub(lambda match: match[1] or "&lt;", text)
            obj.docstring.value = REFERENCE.sub(_linked, text)


def _linked(reference: re.Match[str]) -> str:
    path = reference[1] if "." in reference[1] else f"hf_xsam.{reference[1]}"
    # Optional: only what the reference page shows can be linked to.
    return f'<autoref optional identifier="{path}"><code>{path.rsplit(".", 1)[-1]}</code></autoref>'

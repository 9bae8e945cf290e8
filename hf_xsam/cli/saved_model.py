"""Saved models: the task of each, and how to load it with its trained parameters trainable."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..saving.checkpoint import checkpoints_in
from ..step.refusals import first_line

Task = Literal["text-classification", "image-classification", "text-generation"]

# By a part of the model class's name, and for PEFT's adapters by their task_type.
TASKS: dict[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
ADAPTER_TASKS: dict[str, Task] = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}
LOADERS = {
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "text-generation": AutoModelForCausalLM,
}


@dataclass
class SavedModel:
    """A model in a folder or on the hub.

    Attributes:
        name: its folder or name on the hub.
        task: its name on the hub.
        config: its own, or its base model's.
        base: for a PEFT adapter, its base model's folder or name; else None.
    """

    name: str
    task: Task
    config: PreTrainedConfig
    base: str | None

    @classmethod
    def find(cls, name: str) -> "SavedModel":
        """Return what is known of a model without loading it.

        Raises:
            ValueError: if there is none, or it is for another task; the message says what to do.
        """
        try:
            adapter = find_adapter_config_file(name)
        except (OSError, ValueError):  # for an impossible name, which is refused when its config is read
            adapter = None
        if adapter is None:
            config = _config(name)
            return cls(name, _task(name, config.architectures or []), config, base=None)
        from peft import PeftConfig

        settings = PeftConfig.from_pretrained(name)
        base = str(settings.base_model_name_or_path)
        try:
            config = _config(base)
        except ValueError as error:
            raise ValueError(f"{name!r} is an adapter, and its base model is missing: {error}") from error
        if settings.task_type in ADAPTER_TASKS:
            return cls(name, ADAPTER_TASKS[settings.task_type], config, base)
        saved_as = (settings.auto_mapping or {}).get("base_model_class")
        return cls(name, _task(name, [saved_as] if saved_as else config.architectures or []), config, base)

    def load(self, **settings: Any) -> nn.Module:
        """Return the model in float32, an adapter on its base model and trainable; `settings` override the config's.

        Raises:
            ValueError: if its weights cannot be loaded.
        """
        try:
            model = LOADERS[self.task].from_pretrained(self.base or self.name, dtype="float32", **settings)
            if self.base is None:
                return model
            from peft import PeftModel

            return PeftModel.from_pretrained(model, self.name, is_trainable=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.name!r} cannot be loaded: {error}") from error


def _config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if not os.path.isdir(name):
            raise ValueError(
                f"{name!r} is neither a local folder nor a model that can be loaded from the hub ({first_line(error)})."
            ) from error
        checkpoints = [path.name for path in checkpoints_in(name)]
        instead = f"Measure one of its checkpoints: {', '.join(checkpoints)}." if checkpoints else ""
        raise ValueError(f"The folder {name!r} holds no saved model or adapter. {instead}".rstrip()) from error


def _task(name: str, architectures: list[str]) -> Task:
    for architecture in architectures:
        for part, task in TASKS.items():
            if part in architecture:
                return task
    raise ValueError(
        f"{name!r} is a {', '.join(architectures) or 'model whose config names no architecture'}; it must be a model "
        "for text classification, image classification or causal language modelling. Measure another one from Python, "
        "with hf_xsam.sharpness.measure."
    )

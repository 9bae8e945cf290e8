"""What the recipes for language models share: LoRA's arguments, and the model."""

from dataclasses import dataclass, field
from typing import Literal

from arguments import RecipeArguments
from embedded import smollm2_folder
from loading import named_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_xsam.data.checks import require_end_of_text


@dataclass
class LanguageModelArguments(RecipeArguments):
    """Finetune all weights, or LoRA's factors of some."""

    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Precision of the weights; --bf16 has float32 weights compute in bfloat16."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA's factors and freeze the weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale: the factors' product is times alpha / r."})
    lora_target_modules: str = field(
        default="all-linear",
        metadata={"help": "Modules that LoRA adapts: 'all-linear', or a regular expression on whole names."},
    )


def load_model(recipe: LanguageModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model named, or SmolLM2, and its tokenizer, which then can pad.

    Raises:
        InputError: if they cannot be loaded, or the tokenizer has no end-of-sequence token.
    """
    name = recipe.model_name_or_path or smollm2_folder()
    with named_model(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        require_end_of_text(tokenizer, name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=recipe.dtype)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def lora_config(recipe: LanguageModelArguments) -> LoraConfig | None:
    """Return LoRA's settings, None for full finetuning."""
    if not recipe.use_peft:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        target_modules=recipe.lora_target_modules,
    )

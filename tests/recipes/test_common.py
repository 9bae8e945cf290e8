"""What all recipes share, each on a tiny model: the top eigenvalue at the end, and early stopping."""

import causal_lm
import image_classification
import pytest
import sft
import text_classification
from transformers import EarlyStoppingCallback

from hf_xsam.sharpness import MeasureSettings, measure
from tests.recipes import test_image_classification, test_language_models, test_text_classification
from tests.recipes.test_text_classification import flags

texts = test_text_classification.model_and_data
language = test_language_models.model_and_data
images = test_image_classification.options
DATA = {text_classification: "texts", image_classification: "images", causal_lm: "language", sft: "language"}


@pytest.fixture(params=DATA, ids=lambda recipe: recipe.__name__)
def recipe(request):
    return request.param


@pytest.fixture
def options(recipe, request, tmp_path):
    """Return the options that make a short run of the recipe, on a tiny model and its data."""
    options = request.getfixturevalue(DATA[recipe]) | {"max_steps": "2", "eigenvalue_samples": "0"}
    if recipe is image_classification:
        options |= test_image_classification.saved("vit", tmp_path / "vit")
    return options | ({"bf16": "false"} if recipe is sft else {})


@pytest.fixture
def trainers(recipe, monkeypatch):
    """The trainers that the recipe makes."""
    made, make = [], recipe.make_trainer

    def keep(*arguments, **settings):
        made.append(make(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(recipe, "make_trainer", keep)
    return made


@pytest.mark.parametrize("mode", ["trainer", "sam", "xsam"])
def test_the_top_eigenvalue_is_that_of_the_first_examples(recipe, options, mode, trainers):
    """With an eval_strategy too, and where the last batch is a small one."""
    options |= {"optimizer_mode": mode, "eval_strategy": "epoch", "eigenvalue_samples": "11"}
    metrics = recipe.main(flags(options))
    (trainer,) = trainers
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    batch = collate([trainer.train_dataset[i] for i in range(11)])
    settings = MeasureSettings(trace_samples=0, slice_points=0, rhos=[], tolerance=1e-5)
    found = measure(trainer.model, [batch], settings, progress=False)
    tolerance = 2e-2 if recipe is sft else 2e-3  # TRL's head has finite differences alone
    assert metrics["top_eigenvalue"] == pytest.approx(found.eigenvalues[0], rel=tolerance)
    assert 0 < metrics["top_eigenvalue_residual"] <= tolerance


@pytest.mark.parametrize("mode", ["trainer", "xsam"])
def test_early_stopping(recipe, options, trainers, mode):
    """With a threshold that nothing reaches, training ends after the first evaluation that can be compared."""
    del options["max_steps"]
    each = {"eval_strategy": "steps", "eval_steps": "2", "save_strategy": "steps", "save_steps": "2"}
    stopping = {"load_best_model_at_end": "true", "early_stopping_patience": "1", "early_stopping_threshold": "1e9"}
    recipe.main(flags(options | each | stopping | {"optimizer_mode": mode}))
    (trainer,) = trainers
    assert trainer.state.global_step == 4
    # It would warn in the evaluation on the test split, for want of its metric there.
    assert not any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)

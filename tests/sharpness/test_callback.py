"""`XSAMCallback`: training goes on as without it, and what it logs is the sharpness of the trainer's loss."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_xsam import XSAMCallback, XSAMConfig, XSAMTrainer
from hf_xsam.sharpness import MeasureSettings, measure
from tests.cases import tiny_bert
from tests.helpers import arguments, examples_of, logs_of, save_tiny_language_model, weights_of

# The callback's own.
LITTLE = {"rhos": [0.05], "trace_samples": 0}
KEYS = {"loss", "gradient_norm", "top_eigenvalue", "gradient_angle_degrees", "sam_sharpness"}


def bert_with_dropout():
    torch.manual_seed(0)
    model, _ = tiny_bert()
    assert model.config.hidden_dropout_prob == 0.1
    return model


def sentences(seed=1, count=24):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 99, (count, 12), generator=generator)
    return examples_of({"input_ids": ids, "labels": (ids[:, 0] > 49).long()})


def train(folder, kind=Trainer, callback=None, others=(), dataset=None, compute_loss_func=None, **overrides):
    """Train a tiny BERT with dropout by `kind`; `callback` is the settings of an XSAMCallback."""
    settings = {"xsam_config": XSAMConfig(rho=0.01, eigen_interval=2)} if kind is XSAMTrainer else {}
    args = arguments(folder, **{"num_train_epochs": 1, "learning_rate": 1e-3, **overrides})
    data = sentences() if dataset is None else dataset
    trainer = kind(
        model=bert_with_dropout(),
        args=args,
        train_dataset=data,
        eval_dataset=sentences(2),
        callbacks=list(others),
        compute_loss_func=compute_loss_func,
        **settings,
    )
    if callback is not None:
        trainer.add_callback(XSAMCallback(trainer, **callback))
    trainer.train()
    return trainer


def measured(trainer):
    return [log for log in trainer.state.log_history if "sharpness/loss" in log]


def without_times(logs):
    timed = ("runtime", "per_second")
    return [
        {name: value for name, value in log.items() if not name.endswith(timed)}
        for log in logs
        if "sharpness/loss" not in log
    ]


class AfterEachStep(TrainerCallback):
    """Keeps the weights after every optimizer step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights_of(model))


@pytest.mark.parametrize("kind", [Trainer, XSAMTrainer])
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_training_is_the_same_bit_for_bit(tmp_path, kind, hvp):
    overrides = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "optim": "adamw_torch", "num_train_epochs": 2}
    overrides |= {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    runs = []
    settings = MeasureSettings(**LITTLE | {"trace_samples": 2, "hvp": hvp})
    for callback in (None, {"every": 1, "samples": 10, "settings": settings}):
        recorder = AfterEachStep()
        runs.append((train(tmp_path, kind, callback, [recorder], **overrides), recorder.weights))
    (plain, expected), (watched, weights) = runs
    assert len(weights) == 6
    assert all(torch.equal(x, y) for x, y in zip(weights, expected, strict=True))
    assert without_times(watched.state.log_history) == without_times(plain.state.log_history)
    assert len(measured(watched)) == 6
    assert not measured(plain)


def test_logs_are_of_the_loss_that_is_trained(tmp_path):
    def smoothed(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2)

    settings = MeasureSettings(**LITTLE | {"trace_samples": 3})
    callback = {"every": 4, "samples": 100, "settings": settings}
    trainer = train(tmp_path, callback=callback, compute_loss_func=smoothed)
    # 6 steps: at the 4th and at the last, which is the end of training too.
    assert [log["step"] for log in measured(trainer)] == [4, 6]
    assert all(log.keys() >= {f"sharpness/{name}" for name in KEYS | {"trace"}} for log in measured(trainer))
    columns = {name: torch.stack([row[name] for row in sentences()]) for name in ("input_ids", "labels")}

    def compute_loss(model, batch):
        return smoothed(model(input_ids=batch["input_ids"]), batch["labels"])

    found = measure(trainer.model, [columns], settings, compute_loss=compute_loss, progress=False)
    last = measured(trainer)[-1]
    assert last["sharpness/loss"] == pytest.approx(found.loss, rel=1e-5)
    assert last["sharpness/top_eigenvalue"] == pytest.approx(found.eigenvalues[0], rel=1e-3)
    assert last["sharpness/trace"] == pytest.approx(found.trace.mean, rel=1e-3)
    assert last["sharpness/sam_sharpness"] == pytest.approx(found.sam_sharpness[0.05], rel=1e-3)
    assert last["sharpness/gradient_angle_degrees"] == pytest.approx(found.gradient_angles_degrees[0], abs=0.1)


def test_settings_say_what_is_logged(tmp_path):
    settings = MeasureSettings(top_k=2, trace_samples=0, rhos=[0.3, 1e-3])
    trainer = train(tmp_path, callback={"samples": 8, "settings": settings}, max_steps=1)
    found = XSAMCallback(trainer, samples=8, settings=settings).measure()
    assert (len(found.eigenvalues), list(found.sam_sharpness)) == (2, [0.3, 1e-3])
    [log] = measured(trainer)
    assert log["sharpness/sam_sharpness_0.3"] == pytest.approx(found.sam_sharpness[0.3], rel=1e-5)
    assert log["sharpness/sam_sharpness_0.001"] == pytest.approx(found.sam_sharpness[1e-3], rel=1e-3, abs=1e-6)
    assert "sharpness/sam_sharpness" not in log
    settings = MeasureSettings(trace_samples=0, rhos=[])
    [log] = measured(train(tmp_path, callback={"samples": 8, "settings": settings}, max_steps=1))
    assert "sharpness/top_eigenvalue" in log
    assert not [name for name in log if "sam_sharpness" in name]


def test_all_that_settings_of_one_field_measure_is_logged(tmp_path):
    """Such settings have `measure`'s defaults in the other fields: two rhos, a trace, and slices."""
    settings = MeasureSettings(hvp="finite_difference")
    trainer = train(tmp_path, callback={"samples": 8, "settings": settings}, max_steps=1)
    [log] = measured(trainer)
    keys = KEYS - {"sam_sharpness"} | {"sam_sharpness_0.01", "sam_sharpness_0.05", "trace"}
    assert {name for name in log if name.startswith("sharpness/")} == {f"sharpness/{name}" for name in keys}
    assert settings.slice_points == 21  # the caller's own settings stay
    assert XSAMCallback(trainer, samples=8, settings=settings).measure().slices == {}


def test_the_checkpoint_and_the_reports_have_it(tmp_path):
    class Reports(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(set(logs))

    trainer = train(
        tmp_path, callback={"samples": 4}, others=[Reports()], save_strategy="steps", save_steps=3, max_steps=6
    )
    state = json.loads(Path(tmp_path, "checkpoint-6", "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "sharpness/top_eigenvalue" in log] == [6]
    assert len(measured(trainer)) == 1
    assert any("sharpness/top_eigenvalue" in logs for logs in Reports.seen)


def test_the_best_model_is_measured_when_it_is_loaded(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # The worst one counts for the best, so that it is not the last.
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = train(tmp_path, callback={"samples": 8}, learning_rate=3e-1, **settings)
    last, best = measured(trainer)
    assert last["step"] == best["step"] == 6
    assert last["sharpness/loss"] != best["sharpness/loss"]


def test_a_run_that_stops_early_is_measured_where_it_stops(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = train(tmp_path, callback={"samples": 8}, others=[Stop()])
    assert [log["step"] for log in measured(trainer)] == [3]
    trainer.train()
    assert [log["step"] for log in measured(trainer)] == [3]


def test_unused_columns_and_a_dataset_of_its_own(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"input_ids": [row["input_ids"].tolist() for row in sentences(3)], "labels": [0, 1] * 12}
    data = datasets.Dataset.from_dict(rows | {"review": ["text"] * 24})
    callback = {"dataset": data, "samples": 6}
    trainer = train(tmp_path, callback=callback, dataset=data, remove_unused_columns=True, max_steps=1)
    assert len(measured(trainer)) == 1


def test_random_transforms_leave_training_alone(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return {"input_ids": torch.randint(0, 99, (12,)), "labels": torch.tensor(i % 2)}

    plain, watched = (train(tmp_path, callback=c, dataset=Noisy()) for c in (None, {"every": 2, "samples": 8}))
    assert torch.equal(weights_of(watched.model), weights_of(plain.model))
    assert len(measured(watched)) == 3


def test_trl_counts_its_training_alone(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = save_tiny_language_model(tmp_path / "model")
    data = datasets.Dataset.from_dict({"text": ["a good film", "a bad film", "the plot : dull", "great"] * 3})
    runs = []
    for watched in (False, True):
        settings = {"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 2, "save_strategy": "no"}
        settings |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_train_batch_size": 2, "max_steps": 6}
        args = trl.SFTConfig(output_dir=str(tmp_path), disable_tqdm=True, **settings)
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
        if watched:
            trainer.add_callback(XSAMCallback(trainer, every=1, samples=5))
        trainer.train()
        runs.append(trainer)
    plain, watched = runs
    assert len(measured(watched)) == 6
    assert without_times(watched.state.log_history) == without_times(plain.state.log_history)
    assert torch.equal(weights_of(watched.model), weights_of(plain.model))


def test_a_measurement_that_fails_ends_no_training(tmp_path, caplog):
    def diverging(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels) * math.inf

    trainer = train(tmp_path, callback={"samples": 8}, compute_loss_func=diverging, max_steps=1)
    assert not measured(trainer)
    assert len(logs_of(trainer)) == 1
    assert 'Sharpness was not measured at step 1: ArithmeticError("The loss is nan' in caplog.text


def test_collators_that_draw_give_the_same_batches_whatever_was_drawn_before(tmp_path):
    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return {**batch, "input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 0, batch["input_ids"])}

    losses = []
    for seed in range(2):
        trainer = Trainer(bert_with_dropout(), arguments(tmp_path), collate, train_dataset=sentences())
        torch.manual_seed(seed)
        losses.append(XSAMCallback(trainer).measure().loss)
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        XSAMCallback(trainer).measure()
        assert torch.equal(torch.rand(3), expected)
    assert losses[0] == losses[1]


def test_the_seed_chooses_the_examples(tmp_path):
    trainer = Trainer(bert_with_dropout(), arguments(tmp_path), train_dataset=sentences())
    settings = [MeasureSettings(**LITTLE, seed=seed) for seed in (0, 0, 1)]
    losses = [XSAMCallback(trainer, samples=8, settings=each).measure().loss for each in settings]
    assert losses[0] == losses[1] != losses[2]


def test_what_does_not_fit_is_named(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from sentences()

    trainer = Trainer(bert_with_dropout(), arguments(tmp_path, max_steps=1), train_dataset=Stream())
    with pytest.raises(ValueError, match="which a Stream does not have: pass dataset="):
        XSAMCallback(trainer)
    assert XSAMCallback(trainer, dataset=sentences()).measure().settings["targets"] == 24
    for name in ("every", "samples"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            XSAMCallback(trainer, dataset=sentences(), **{name: 0})
    with pytest.raises(ValueError, match="eigen_scope is 'lora', which matches no trainable parameter"):
        XSAMCallback(trainer, dataset=sentences(), settings=MeasureSettings(eigen_scope="lora"))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="cannot measure a model sharded by FSDP"):
        XSAMCallback(trainer, dataset=sentences())

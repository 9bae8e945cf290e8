"""X-SAM's state in the Trainer's checkpoints, and the Trainer's features around them."""

import inspect
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.saving.checkpoint import STATE_NAME, last_complete_checkpoint
from tests.faults import outcome, same
from tests.helpers import arguments, examples_of, logs_of, run, weights_of
from tests.models import Smooth, bert, points, sentences

VECTOR_FILE = "xsam_eigenvector-00000-of-00001.safetensors"
CONFIG = {"rho": 0.1, "alpha": 0.5, "eigen_interval": 3, "eigen_warmup_steps": 0}
SAVING = {"save_strategy": "steps", "save_steps": 2, "optimizer": "AdamW", "gradient_accumulation_steps": 2}


def trainer_for(folder, model=None, config=None, trainer_class=XSAMTrainer, **settings):
    optimizer = getattr(torch.optim, settings.pop("optimizer", "AdamW"))
    return trainer_class(
        model=model or bert(0.1),
        args=arguments(folder, **settings),
        train_dataset=examples_of(sentences()),
        optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-2}),
        **({} if trainer_class is Trainer else {"xsam_config": XSAMConfig(**(config or CONFIG))}),
    )


@pytest.fixture
def checkpoint(tmp_path):
    """The checkpoint after step 2 of 4."""
    run(bert(0.1), sentences(), tmp_path, XSAMConfig(**CONFIG), **SAVING)
    return tmp_path / "checkpoint-2"


class TestResume:
    @pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
    @pytest.mark.parametrize("accumulation", [1, 2, 3])
    @pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
    def test_equals_the_uninterrupted_run(self, tmp_path, hvp, accumulation, optimizer):
        settings = {**SAVING, "optimizer": optimizer, "gradient_accumulation_steps": accumulation, "save_steps": 1}
        config = {**CONFIG, "hvp": hvp}
        whole = trainer_for(tmp_path, config=config, **settings)
        whole.train()
        last = whole.state.global_step
        for step in (1, last // 2 + 1):
            resumed = trainer_for(tmp_path, bert(0.1, seed=5), config, **settings)
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert same(outcome(resumed), outcome(whole))
            assert logs_of(resumed)[-1] == logs_of(whole)[-1]

    def test_the_files(self, checkpoint):
        contents = json.loads((checkpoint / STATE_NAME).read_text())
        assert XSAMConfig.from_dict(contents["config"]) == XSAMConfig(**CONFIG, log_metrics="all")
        assert (contents["step"], contents["refreshed_at"], contents["skipped_steps"]) == (2, 0, 0)
        vector = load_file(checkpoint / VECTOR_FILE)
        assert list(vector) == sorted(name for name, _ in bert().named_parameters())
        assert torch.stack([part.norm() for part in vector.values()]).norm().item() == pytest.approx(1, abs=1e-5)
        assert not list(checkpoint.glob("*.partial"))

    def test_sam_has_no_eigenvector_to_save(self, tmp_path):
        config = {"alpha": 0.0, "rho": 0.1}
        whole = run(bert(0.1), sentences(), tmp_path, XSAMConfig(**config), **SAVING)
        assert (tmp_path / "checkpoint-2" / STATE_NAME).exists()
        assert not (tmp_path / "checkpoint-2" / VECTOR_FILE).exists()
        resumed = trainer_for(tmp_path, config=config, **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert torch.equal(weights_of(resumed.model), weights_of(whole.model))

    def test_a_warm_start_before_the_first_refresh(self, tmp_path):
        """It may be of any norm, and name some of the parameters only."""
        start = {"classifier.weight": torch.full((2, 16), 3.0)}
        config = {**CONFIG, "eigen_start_step": 3, "eigen_momentum": 0.9}  # so that something is left of the start
        whole = trainer_for(tmp_path, config=config, **SAVING)
        whole.xsam_state.eigenvector = start
        whole.train()
        assert whole.xsam_state.refreshed_at == 3
        resumed = trainer_for(tmp_path, config=config, **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert same(outcome(resumed), outcome(whole))

    @pytest.mark.parametrize("frozen_until", [1, 3])
    @pytest.mark.parametrize(
        "config", [CONFIG, {**CONFIG, "perturbation": "random", "alpha": 0.0, "rho": 0.5}], ids=["two passes", "random"]
    )
    def test_layers_that_a_callback_freezes_and_unfreezes(self, tmp_path, config, frozen_until):
        class Unfreezing(TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, **kwargs):
                model.bert.requires_grad_(state.global_step >= frozen_until)

            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step == frozen_until:
                    model.bert.requires_grad_(True)

        def trainer():
            made = trainer_for(tmp_path, config=config, **SAVING)
            made.add_callback(Unfreezing())
            return made

        (whole := trainer()).train()
        if "perturbation" not in config:
            assert len(load_file(tmp_path / "checkpoint-2" / VECTOR_FILE)) == 2  # the classifier's
            assert len(whole.xsam_state.eigenvector) > 2
        (resumed := trainer()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert same(outcome(resumed), outcome(whole))

    @pytest.mark.parametrize(
        "config",
        [
            XSAMConfig(rho=0.05, alpha=0.0),
            XSAMConfig(rho=0.05),
            XSAMConfig.one_pass(0.05, hvp="finite_difference", eigen_interval=1),
            XSAMConfig.one_pass(0.05, perturbation="random"),
        ],
        ids=["sam", "x-sam", "differences", "random"],
    )
    def test_a_schedule_free_optimizer(self, tmp_path, caplog, config):
        optimizers = pytest.importorskip("pytorch_optimizer")
        watching = {"num_train_epochs": 2, "save_strategy": "steps", "eval_strategy": "steps"}

        def trainer():
            model, data = Smooth(), examples_of(points(32))
            optimizer = optimizers.ScheduleFreeAdamW(model.parameters(), lr=0.1)
            args = arguments(tmp_path, **watching, save_steps=4, eval_steps=4)
            return XSAMTrainer(
                model, args, train_dataset=data, eval_dataset=data, xsam_config=config, optimizers=(optimizer, None)
            )

        (whole := trainer()).train()
        (resumed := trainer()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
        assert "run again at the same weights" not in caplog.text

    def test_a_stock_checkpoint(self, tmp_path, caplog):
        trainer_for(tmp_path, trainer_class=Trainer, **SAVING).train()
        resumed = trainer_for(tmp_path, **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert f"checkpoint-2 has no {STATE_NAME}" in caplog.text
        assert resumed.xsam_state.refreshed_at == 2  # at once
        assert resumed.state.global_step == 4

    def test_other_settings_are_named(self, checkpoint, caplog):
        resumed = trainer_for(checkpoint.parent, config={**CONFIG, "rho": 0.2, "correction": "aligned"}, **SAVING)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert "other X-SAM settings: rho 0.1 -> 0.2, correction 'paper' -> 'aligned'" in caplog.text

    def test_the_stock_trainer_resumes_it_too(self, checkpoint):
        trainer = trainer_for(checkpoint.parent, trainer_class=Trainer, **SAVING)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 4


class TestDamage:
    def refused(self, checkpoint, match, config=None, model=None):
        trainer = trainer_for(checkpoint.parent, model, config, **SAVING)
        before = {path: path.read_bytes() for path in checkpoint.iterdir()}
        with pytest.raises(ValueError, match=match):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert before == {path: path.read_bytes() for path in checkpoint.iterdir()}

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 2}'])
    def test_json(self, checkpoint, text):
        (checkpoint / STATE_NAME).write_text(text)
        self.refused(checkpoint, f"checkpoint-2/{STATE_NAME} is damaged.*Resume from another checkpoint, or delete")

    def test_missing_eigenvector(self, checkpoint):
        (checkpoint / VECTOR_FILE).unlink()
        self.refused(checkpoint, f"checkpoint-2/{VECTOR_FILE} is missing or damaged")

    @pytest.mark.parametrize("size", [0, 7, 100, -1])
    def test_truncated_eigenvector(self, checkpoint, size):
        path = checkpoint / VECTOR_FILE
        path.write_bytes(path.read_bytes()[:size])
        self.refused(checkpoint, f"checkpoint-2/{VECTOR_FILE} is missing or damaged")

    @pytest.mark.parametrize("value", [0.0, float("nan"), 3.0])
    def test_overwritten_eigenvector(self, checkpoint, value):
        vector = load_file(checkpoint / VECTOR_FILE)
        offsets = {name: json.dumps([0] * part.dim()) for name, part in vector.items()}
        save_file({n: torch.full_like(p, value) for n, p in vector.items()}, checkpoint / VECTOR_FILE, offsets)
        self.refused(checkpoint, f"checkpoint-2/{VECTOR_FILE} is damaged: the eigenvector's norm is")

    def test_another_scope(self, checkpoint):
        self.refused(
            checkpoint, "spans parameters that are not in.*such as 'bert", {**CONFIG, "eigen_scope": "layer.0"}
        )

    def test_a_file_that_something_else_wrote(self, checkpoint):
        save_file(load_file(checkpoint / VECTOR_FILE), checkpoint / VECTOR_FILE)
        self.refused(checkpoint, r"at \[\], which does not fit")

    def test_another_shape(self, checkpoint):
        vector = load_file(checkpoint / VECTOR_FILE)
        vector["classifier.weight"] = torch.ones(3, 16)
        offsets = {name: json.dumps([0] * part.dim()) for name, part in vector.items()}
        save_file(vector, checkpoint / VECTOR_FILE, offsets)
        self.refused(checkpoint, r"classifier.weight' in shape \(3, 16\) at \[0, 0\].*does not fit.*\(2, 16\)")


class TestLastCompleteCheckpoint:
    def test_interrupted_saves_are_passed_over(self, tmp_path, caplog):
        whole = run(bert(0.1), sentences(), tmp_path, XSAMConfig(**CONFIG), **{**SAVING, "save_steps": 1})
        newest = tmp_path / "checkpoint-4"
        assert last_complete_checkpoint(str(tmp_path)) == str(newest)
        os.truncate(newest / "trainer_state.json", 50)
        (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
        (tmp_path / "checkpoint-best").mkdir()
        assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
        assert caplog.text.count("is skipped: saving it was interrupted") == 2
        resumed = trainer_for(tmp_path, **{**SAVING, "save_steps": 1})
        resumed.train(resume_from_checkpoint=True)
        assert same(outcome(resumed), outcome(whole))

    def test_the_other_processes_random_states_count(self, checkpoint):
        path = checkpoint / STATE_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
        Path(checkpoint.parent / "checkpoint-4" / "trainer_state.json").unlink()
        with pytest.raises(ValueError, match="No valid checkpoint found.*Train without resume_from_checkpoint"):
            last_complete_checkpoint(str(checkpoint.parent))
        for rank in range(2):
            (checkpoint / f"rng_state_{rank}.pth").write_bytes((checkpoint / "rng_state.pth").read_bytes())
        assert last_complete_checkpoint(str(checkpoint.parent)) == str(checkpoint)
        (checkpoint / "rng_state_0.pth").unlink()
        # With save_on_each_node, the first one's may be on another machine.
        assert last_complete_checkpoint(str(checkpoint.parent), [1]) == str(checkpoint)
        (checkpoint / "rng_state_0.pth").write_bytes((checkpoint / "rng_state.pth").read_bytes())
        os.truncate(checkpoint / "rng_state_1.pth", 1000)
        with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
            last_complete_checkpoint(str(checkpoint.parent), [1])
        with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
            last_complete_checkpoint(str(checkpoint.parent))

    def test_none(self, tmp_path):
        with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
            trainer_for(tmp_path).train(resume_from_checkpoint=True)


class TestPrivateMethods:
    """The methods of the Trainer that the mixin overrides: a release that changes them must fail here."""

    def test_signatures(self):
        saves = inspect.signature(Trainer._save_optimizer_and_scheduler)
        loads = inspect.signature(Trainer._load_optimizer_and_scheduler)
        assert list(saves.parameters) == ["self", "output_dir"]
        assert list(loads.parameters) == ["self", "checkpoint"]

    def test_saved_before_the_checkpoint_counts_and_read_before_the_first_step(self, tmp_path):
        class Order(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                folder = tmp_path / f"checkpoint-{state.global_step}"
                times = [(folder / name).stat().st_mtime_ns for name in (VECTOR_FILE, STATE_NAME, "trainer_state.json")]
                assert times == sorted(times)
                seen.append(state.global_step)

            def on_train_begin(self, args, state, control, **kwargs):
                seen.append(trainer.xsam_state.step)

        seen = []
        trainer = trainer_for(tmp_path, **SAVING)
        trainer.add_callback(Order())
        trainer.train()
        trainer = trainer_for(tmp_path, **SAVING)
        trainer.add_callback(Order())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert seen == [0, 2, 4, 2, 4]


class TestFeatures:
    def test_load_best_model_at_end(self, tmp_path):
        trainer = XSAMTrainer(
            model=bert(0.1),
            args=arguments(
                tmp_path,
                eval_strategy="steps",
                eval_steps=2,
                save_strategy="steps",
                save_steps=2,
                load_best_model_at_end=True,
            ),
            train_dataset=examples_of(sentences()),
            eval_dataset=examples_of(sentences(8, seed=3)),
            xsam_config=XSAMConfig(**CONFIG),
        )
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert (best / STATE_NAME).exists()
        expected = load_file(best / "model.safetensors")
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, expected[name])
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))

    def test_save_total_limit(self, tmp_path):
        run(bert(), sentences(), tmp_path, XSAMConfig(**CONFIG), **SAVING, save_total_limit=1)
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
        assert (tmp_path / "checkpoint-4" / VECTOR_FILE).exists()

    def test_save_only_model(self, tmp_path, caplog):
        run(bert(), sentences(), tmp_path, XSAMConfig(**CONFIG), **SAVING, save_only_model=True)
        assert not list((tmp_path / "checkpoint-2").glob("xsam_state*"))
        assert not (tmp_path / "checkpoint-2" / VECTOR_FILE).exists()
        assert (tmp_path / "checkpoint-2" / "xsam_config.json").exists()
        resumed = trainer_for(tmp_path, **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert "or with save_only_model" in caplog.text

    def test_auto_find_batch_size(self, tmp_path):
        calls = []

        class Large(nn.Module):
            largest = 8

            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.model = bert()

            def forward(self, input_ids, labels):
                calls.append(1)
                if len(labels) > self.largest and len(calls) > 3:
                    raise RuntimeError("CUDA out of memory.")
                return self.model(input_ids=input_ids, labels=labels)

        config = XSAMConfig(**{**CONFIG, "hvp": "finite_difference", "power_iterations": 1})
        trainer = run(
            Large(), sentences(), tmp_path, config, per_device_train_batch_size=16, auto_find_batch_size=True
        )  # fmt: skip
        assert trainer._train_batch_size <= 8
        assert trainer.state.global_step == trainer.xsam_state.step == trainer.state.max_steps
        assert trainer.xsam_state.refreshed_at % 3 == 0
        assert [log["xsam/skipped_steps"] for log in logs_of(trainer)][-1] == 0

    def test_hyperparameter_search(self, tmp_path):
        pytest.importorskip("optuna")

        def model_init(trial):
            if trial is not None:
                trainer.xsam_config = XSAMConfig(**{**CONFIG, "rho": trial.suggest_float("rho", 0.01, 0.5)})
            return bert()

        trainer = XSAMTrainer(
            model_init=model_init,
            args=arguments(tmp_path, eval_strategy="epoch", num_train_epochs=1),
            train_dataset=examples_of(sentences()),
            eval_dataset=examples_of(sentences(8, seed=3)),
            xsam_config=XSAMConfig(**CONFIG),
        )
        starts, rhos = [], []

        class Starts(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                starts.append((trainer.xsam_state.step, trainer.xsam_state.eigenvector, args.learning_rate))

            def on_train_end(self, args, state, control, **kwargs):
                rhos.append(trainer._xsam_steps.config.rho)

        trainer.add_callback(Starts())
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
            n_trials=3,
            backend="optuna",
        )
        assert best.hyperparameters["learning_rate"] in [rate for _, _, rate in starts]
        assert [(step, vector) for step, vector, _ in starts] == [(0, None)] * 3
        assert best.hyperparameters["rho"] in rhos
        assert len(set(rhos)) == 3


def test_interrupted_by_hand(tmp_path):
    """Ctrl-C in the perturbed pass: weights as before the step, gradients cleared, and training can go on."""
    trainer = trainer_for(tmp_path, bert(), {"rho": 0.1, "alpha": 0.0, "replay_check": "never"}, **SAVING)
    seen = []

    def interrupt(module, inputs, output):
        seen.append(weights_of(module))
        if len(seen) == 4:  # the second micro-batch of the second pass
            raise KeyboardInterrupt

    handle = trainer.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert torch.equal(seen[1], seen[0])
    assert not torch.equal(seen[3], seen[0])
    assert torch.equal(weights_of(trainer.model), weights_of(bert()))
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.train()
    assert trainer.state.global_step == 4

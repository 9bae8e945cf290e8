"""200 random faults over small runs: weights, v, optimizer state and resume are right every time."""

import multiprocessing
import random
import tempfile
import time
from functools import cache

import pytest
import torch
from transformers import Trainer

from tests.faults import (
    STEPS,
    FaultyModel,
    Run,
    newest_checkpoint,
    outcome,
    run_with_fault,
    same,
    train_in_subprocess,
)
from tests.helpers import weights_of

IN_PROCESS, KILLS = 160, 40


@cache
def clean(seed, scaler=None):
    """Return what the run of this seed gives when nothing goes wrong, and its number of forward passes."""
    with tempfile.TemporaryDirectory() as folder:
        model = FaultyModel()
        trainer = Run.draw(seed, scaler).trainer(folder, model, save_strategy="no")
        trainer.train()
        assert trainer.xsam_state.skipped_steps == 0
        return outcome(trainer), model.count.calls


@pytest.mark.parametrize("number", range(IN_PROCESS))
def test_a_fault_in_a_forward_pass(tmp_path, number):
    draw = random.Random(1000 + number)
    seed = number % 20
    kind = draw.choice(["nan", "inf", "-inf", "gradient", "exception", "interrupt"])
    run, (undisturbed, calls) = Run.draw(seed), clean(seed)
    first = draw.randrange(calls)
    faulty = range(first, first + draw.choice([1, 1, 2, 5]))
    trainer, inspector = run_with_fault(run, kind, faulty, tmp_path)
    assert inspector.wrong == []
    if kind in ("exception", "interrupt"):
        assert trainer.model.count.fired == 1
        assert torch.equal(weights_of(trainer.model), inspector.before["weights"])
        assert all(p.grad is None for p in trainer.model.parameters())
        expected, checkpoint = undisturbed, newest_checkpoint(tmp_path)
    else:
        assert trainer.state.global_step == STEPS
        assert trainer.model.count.fired > 0
        # The checkpoint after the step that the fault fell in goes on as this run did.
        expected, checkpoint = outcome(trainer), str(tmp_path / f"checkpoint-{STEPS - 1}")
        if not same(expected["model"], undisturbed["model"]) and inspector.last_faulty_step == STEPS:
            return
    resumed = run.trainer(tmp_path)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(outcome(resumed), expected)


class TestKilled:
    """SIGKILL at a random time, in the middle of whatever it was, saving included."""

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults"])

        def start(run, folder, output):
            started = context.Event()
            process = context.Process(target=train_in_subprocess, args=(run, folder, output, started))
            process.start()
            assert started.wait(120)
            return process

        return start

    @pytest.fixture(scope="class")
    @classmethod
    def duration(cls, start, tmp_path_factory):
        folder = tmp_path_factory.mktemp("timed")
        began = time.monotonic()
        start(Run.draw(0, scaler=False), folder / "run", folder / "outcome.pt").join()
        return time.monotonic() - began

    @pytest.mark.parametrize("number", range(KILLS))
    def test_resumed_equals_uninterrupted(self, start, duration, tmp_path, number):
        run, folder, output = Run.draw(number % 10, scaler=False), tmp_path / "run", tmp_path / "outcome.pt"
        process = start(run, folder, output)
        time.sleep(random.Random(number).uniform(0, duration))
        process.kill()
        process.join()
        output.unlink(missing_ok=True)
        process = start(run, folder, output)
        process.join()
        assert process.exitcode == 0
        assert same(torch.load(output), clean(number % 10, False)[0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_faulty_second_pass_leaves_the_stock_step(tmp_path, accumulation):
    settings = {"rho": 0.5, "alpha": 0.5, "eigen_start_step": 5, "replay_check": "never"}
    run = Run(settings, accumulation, "AdamW", scaler=False, seed=0)
    trainer, _ = run_with_fault(run, "nan", [accumulation], tmp_path)
    assert trainer.xsam_state.skipped_steps == 1
    stock = run.trainer(tmp_path / "stock", max_steps=1, trainer_class=Trainer)
    stock.train()
    trainer = run.trainer(tmp_path / "first", FaultyModel("nan", [accumulation]), max_steps=1)
    trainer.train()
    assert torch.equal(weights_of(trainer.model), weights_of(stock.model))
    assert not torch.equal(weights_of(trainer.model), weights_of(FaultyModel()))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_loss_that_stays_nan_leaves_everything(tmp_path, optimizer):
    run = Run({"rho": 0.5}, 2, optimizer, scaler=False, seed=0)
    trainer, _ = run_with_fault(run, "nan", range(10000), tmp_path)
    assert trainer.xsam_state.skipped_steps == trainer.state.global_step == STEPS
    assert torch.equal(weights_of(trainer.model), weights_of(FaultyModel()))
    assert trainer.xsam_state.eigenvector is None
    assert [log["xsam/skipped_steps"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]

"""The experiments: which runs there are, what survives an interruption and a failure."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import preparing
import protocol
import psutil
import pytest
import run
import tables
import tasks
import training
from cost import CostJob, long_epochs, operations
from modes import ALL_MODES, MODES
from protocol import chosen_settings, is_done, reporting_jobs, tuning_jobs
from records import RESULTS, file_of, load, save
from training import Job

from tests.experiments.helpers import keep, remove

ROOT = Path(__file__).parents[2]
DIGITS = tasks.TASKS["digits_cnn"]


def start(*options):
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process):
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


def lines_of_runs(output):
    return [line.split("] ")[1].split(": ")[0] for line in output.splitlines() if line.startswith("[")]


class TestJobs:
    @pytest.mark.parametrize("name", [name for name, task in tasks.TASKS.items() if not task.swept])
    def test_each_mode_is_tuned_with_as_many_runs(self, name, tmp_path):
        jobs = tuning_jobs(name, ALL_MODES, tmp_path)
        points = len(tasks.TASKS[name].stock_learning_rates)
        assert set(Counter(job.mode for job in jobs).values()) == {points * len(tasks.TASKS[name].tuning_seeds)}
        assert {job.mode for job in jobs} == set(MODES)
        assert len({job.key for job in jobs}) == len(jobs)

    def test_a_seed_is_finished_before_the_next(self, tmp_path):
        jobs, waiting = reporting_jobs("digits_cnn", "fixed", ["stock", "sam", "paper"], [3, 1], tmp_path)
        expected = [(seed, mode) for seed in (3, 1) for mode in ("stock", "sam", "paper")]
        assert [(job.seed, job.mode) for job in jobs] == expected
        assert waiting == []
        assert {(job.learning_rate, job.rho) for job in jobs} == {(0.05, None), (0.05, 0.05)}

    def test_longer_runs_wait_for_the_cost(self, tmp_path):
        modes = ["sam", "stock_long", "sam_long"]
        jobs, waiting = reporting_jobs("digits_cnn", "fixed", modes, [0], tmp_path)
        assert [job.mode for job in jobs] == ["sam"]
        assert waiting == ["stock_long", "sam_long"]
        cost = {"relative_cpu_seconds": {"stock": 1.0, "sam": 2.0, "paper": 4.5}}
        keep(CostJob("digits_cnn"), cost, tmp_path)
        jobs, waiting = reporting_jobs("digits_cnn", "fixed", modes, [0], tmp_path)
        assert {job.mode: job.epochs for job in jobs} == {"sam": 40, "stock_long": 180, "sam_long": 90}
        assert long_epochs(1, "sam_long", cost) == 2.25

    def test_modes_keep_the_library_s_defaults_but_for_what_they_name(self):
        default = training.XSAMConfig().to_dict()
        for mode, kind in MODES.items():
            if kind.xsam is not None:
                xsam = Job("digits_vit_wrong40", "fixed", mode, 0, 1e-3, 0.1, 60).settings()["xsam"]
                assert xsam.pop("direction", None) == ("random" if kind.random else None)
                assert xsam == {**{name: default[name] for name in xsam}, "rho": 0.1, **kind.xsam}

    def test_the_first_tasks_keep_the_estimate_of_their_results(self):
        for name in ("digits_cnn", "movies"):
            xsam = Job(name, "fixed", "paper", 0, 0.05, 0.1, 1).settings()["xsam"]
            assert xsam.items() >= tasks.FIRST_ESTIMATE.items()

    def test_the_estimate_is_not_among_the_settings_of_sam_which_has_none(self):
        for mode in ("sam", "sam_late_0.7", "sam_long"):
            xsam = Job("digits_cnn_wrong40", "fixed", mode, 0, 0.05, 0.1, 1).settings()["xsam"]
            assert not xsam.keys() & tasks.SECOND_ESTIMATE.keys()
        for mode in ("paper", "one_pass", "one_pass_random"):
            xsam = Job("digits_cnn_wrong40", "fixed", mode, 0, 0.05, 0.1, 1).settings()["xsam"]
            assert xsam.items() >= tasks.SECOND_ESTIMATE.items()

    def test_a_mode_s_radii_are_multiples_of_sam_s(self):
        task = tasks.TASKS["digits_cnn_wrong40"]
        for mode, factor in {"sam": 1, "paper_random": 1, "one_pass_late_0.7": 5, "one_pass_random": 40}.items():
            tried = {*protocol.axes(task, mode)[1]}
            assert tried == {0.1 * factor, 0.2 * factor, 0.4 * factor}
        assert {*protocol.axes(task, "one_pass_differences")[1]} == {0.35, 0.7, 1.4}

    def test_seeds_for_tuning_are_not_reported(self, capsys):
        with pytest.raises(SystemExit):
            run.parse(["--tasks", "digits_cnn", "--seeds", "0", "101"])
        assert "--seeds has [101], which the settings are chosen by" in capsys.readouterr().err


class TestChoice:
    def finish(self, results, job, value, loss):
        record = {"settings": job.settings(), "metrics": {"validation": {"accuracy": value, "loss": loss}}}
        keep(job, record, results)

    def test_best_mean_then_loss(self, tmp_path):
        jobs = tuning_jobs("digits_cnn", ["sam"], tmp_path)
        assert chosen_settings(jobs, tmp_path) is None
        for job in jobs:
            self.finish(tmp_path, job, 0.5, 1.0)
        best = [job for job in jobs if (job.learning_rate, job.rho) == (0.05, 0.1)]
        self.finish(tmp_path, best[0], 0.9, 1.0)
        self.finish(tmp_path, best[1], 0.7, 1.0)
        # The best single run belongs to a worse mean; the same mean has a higher loss; one diverged.
        unsteady = [job for job in jobs if (job.learning_rate, job.rho) == (0.2, 0.05)]
        self.finish(tmp_path, unsteady[0], 0.99, 1.0)
        same = [job for job in jobs if (job.learning_rate, job.rho) == (0.2, 0.1)]
        self.finish(tmp_path, same[0], 0.9, 1.1)
        self.finish(tmp_path, same[1], 0.7, 1.1)
        self.finish(tmp_path, jobs[0], math.nan, math.nan)
        assert chosen_settings(jobs, tmp_path) == (0.05, 0.1)
        remove(best[1], tmp_path)
        assert chosen_settings(jobs, tmp_path) is None
        assert reporting_jobs("digits_cnn", "tuned", ["sam"], [0], tmp_path) == ([], ["sam"])

    def test_lower_perplexity_is_better(self, tmp_path):
        jobs = tuning_jobs("movie_text_lora", ["stock"], tmp_path)
        for job in jobs:
            value = {5e-4: 50.0, 4e-3: None}.get(job.learning_rate, 60.0)
            keep(job, {"metrics": {"validation": {"perplexity": value, "loss": 1.0}}}, tmp_path)
        assert chosen_settings(jobs, tmp_path) == (5e-4, None)

    def test_the_grid_is_widened_where_its_best_point_is_at_an_end(self, tmp_path):
        name = "digits_vit_wrong40"

        def tried_after(mode, best_rate, best_rho):
            for job in tuning_jobs(name, [mode], tmp_path):
                distance = abs(math.log(job.learning_rate / best_rate))
                distance += abs(math.log(job.rho / best_rho)) if job.rho else 0
                self.finish(tmp_path, job, -distance, 1.0)
            return {(job.learning_rate, job.rho) for job in tuning_jobs(name, [mode], tmp_path)}

        rates, rhos = {1e-3, 2e-3}, {0.15, 0.3, 0.6}
        assert tried_after("one_pass", 5e-3, 0.3) == {*product(rates | {4e-3}, rhos)}
        assert tried_after("one_pass", 5e-3, 0.01) == {*product(rates | {4e-3}, rhos | {0.075})}
        widest = {*product(rates | {4e-3, 8e-3}, rhos | {0.075, 0.0375})}
        assert tried_after("one_pass", 1.0, 0.01) == tried_after("one_pass", 1.0, 0.01) == widest
        stock_rates = {*tasks.TASKS[name].stock_learning_rates}
        assert tried_after("stock", 1e-3, 1.0) == {*product(stock_rates, [None])}
        assert tried_after("stock", 1e-6, 1.0) == {*product(stock_rates | {1.25e-4}, [None])}


class TestRecords:
    job = Job("digits_cnn", "fixed", "sam", 0, 0.05, 0.05, 40)

    def test_a_result_under_other_settings_is_refused(self, tmp_path):
        assert not is_done(self.job, tmp_path)
        keep(self.job, {"settings": self.job.settings()}, tmp_path)
        assert is_done(self.job, tmp_path)
        other = Job("digits_cnn", "fixed", "sam", 0, 0.05, 0.1, 41)
        with pytest.raises(ValueError, match=r"jsonl has fixed/sam/0 with other settings \(epochs, xsam\)\. Delete"):
            is_done(other, tmp_path)

    def test_a_later_record_takes_the_place_of_an_earlier_one(self, tmp_path):
        for value in (0.1, 1 / 3):
            save({"value": value}, "b", "task", tmp_path)
        save({}, "a", "task", tmp_path)
        assert list(load("task", tmp_path).items()) == [("a", {"run": "a"}), ("b", {"run": "b", "value": 1 / 3})]

    def test_numbers_that_are_not_finite_become_null(self, tmp_path):
        save({"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}}, "key", "task", tmp_path)
        assert load("task", tmp_path) == {"key": {"run": "key", "a": [None, None, 1.5], "b": {"c": None}}}

    def test_what_cannot_be_written_leaves_the_others(self, tmp_path):
        save({"value": 1}, "a", "task", tmp_path)
        with pytest.raises(TypeError, match="not JSON serializable"):
            save({"value": object()}, "b", "task", tmp_path)
        assert load("task", tmp_path) == {"a": {"run": "a", "value": 1}}

    def test_processes_lose_nothing_of_each_other(self, tmp_path):
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=save_many, args=(name, tmp_path)) for name in "abc"]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert load("task", tmp_path).keys() == {f"{name}{number}" for name in "abc" for number in range(MANY)}

    @pytest.mark.parametrize("task", tasks.TASKS)
    def test_the_committed_ones_are_of_the_settings_here(self, task):
        for key, record in load(task, RESULTS).items():
            job = CostJob(task)
            if key != job.key:
                settings = record["settings"]
                point = settings["learning_rate"], settings["xsam"] and settings["xsam"]["rho"], settings["epochs"]
                job = Job(task, record["part"], record["mode"], record["seed"], *point)
            assert job.key == key
            assert is_done(job, RESULTS)


MANY = 40


def save_many(name, results):
    for number in range(MANY):
        save({}, f"{name}{number}", "task", results)


def test_wrong_labels():
    labels = np.random.default_rng(0).integers(0, 10, 1077).tolist()
    changed = preparing.with_wrong_labels(labels, 0.1, 10, seed=1)
    assert sum(a != b for a, b in zip(labels, changed, strict=True)) == 108
    assert set(changed) == set(range(10))
    assert changed == preparing.with_wrong_labels(labels, 0.1, 10, seed=1)
    assert changed != preparing.with_wrong_labels(labels, 0.1, 10, seed=2)
    assert preparing.with_wrong_labels([0, 1, 1, 0], 1.0, 2, seed=0) == [1, 0, 0, 1]
    assert preparing.with_wrong_labels(labels, 0.0, 10, seed=1) == labels


def test_failed_interrupted_killed_and_run_again(tmp_path):
    options = ["--tasks", "digits_cnn", "--modes", "sam", "--seeds", 0, "--epochs", 0.5, "--workers", 1]
    options += ["--results", tmp_path]
    jobs = tuning_jobs("digits_cnn", ["sam"], tmp_path, 0.5)

    # The first job's result cannot be written, the second one's process is killed; the others go on, until Ctrl-C.
    in_the_way = file_of("digits_cnn", tmp_path)
    in_the_way.mkdir()
    process = start(*options)
    assert process.stdout.readline() == "0 of 12 runs have results.\n"
    assert f"[1/12] {jobs[0]}: FAILED (IsADirectoryError" in process.stdout.readline()
    in_the_way.rmdir()
    wait_until(lambda: psutil.Process(process.pid).children(), process)[0].kill()
    assert f"[2/12] {jobs[1]}: FAILED (The process ended with exit code -9.)" in process.stdout.readline()
    wait_until(lambda: load("digits_cnn", tmp_path), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "Interrupted. The same command goes on from here."
    assert "Traceback" not in errors
    failures = sorted(tmp_path.rglob("*.error.txt"))
    assert failures == sorted(run.error_path(job, tmp_path) for job in jobs[:2])
    first = load("digits_cnn", tmp_path)

    # The command itself is killed, and its worker ends with it.
    process = start(*options)
    wait_until(lambda: len(load("digits_cnn", tmp_path)) > len(first), process)
    worker = wait_until(lambda: psutil.Process(process.pid).children(), process)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(worker, timeout=60)[1] == []
    second = load("digits_cnn", tmp_path)

    process = start(*options)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    final = load("digits_cnn", tmp_path)
    assert len(final) == len(jobs) + 1
    assert first.items() <= second.items() <= final.items()
    assert len(lines_of_runs(output)) == len(set(lines_of_runs(output))) == len(final) - len(second)
    assert list(tmp_path.rglob("*.error.txt")) == []
    record = final["tuned/sam/0"]
    assert (record["settings"]["learning_rate"], record["settings"]["xsam"]["rho"]) == chosen_settings(jobs, tmp_path)
    assert set(final[jobs[0].key]["metrics"]) == {"validation"}
    assert set(record["metrics"]) == {"validation", "test", "train", "loss_gap", "top_eigenvalue"}
    assert record["cost"]["forward_passes"] == 2 * record["cost"]["steps"]

    # Another mode beside it, in this process, and the report of both.
    job = Job("digits_cnn", "tuned", "aligned_1", 0, 0.05, 0.05, 2)
    keep(job, job.run(), tmp_path)
    found = load("digits_cnn", tmp_path)[job.key]
    metrics, cost = found["metrics"], found["cost"]
    assert found["settings"]["xsam"]["correction"] == "aligned"
    assert cost["steps"] == 2 * math.ceil(1077 / 64)
    assert cost["forward_passes"] > 2 * cost["steps"]
    assert metrics["top_eigenvalue"] > 0
    assert metrics["loss_gap"] == metrics["test"]["loss"] - metrics["train"]["loss"]
    assert metrics["test"]["accuracy"] > 0.5
    assert len(found["commit"]) >= 40
    assert found["versions"]["torch"]
    runs = tables.runs_of(load("digits_cnn", tmp_path), "tuned")
    assert list(runs) == ["sam", "aligned_1"]
    assert f"| {metrics['test']['accuracy']:.4g} | {metrics['top_eigenvalue']:.4g} |" in tables.summary(
        "digits_cnn", runs
    )


def test_a_run_that_diverged_has_a_result(tmp_path):
    job = Job("digits_cnn", "fixed", "sam", 0, 1e20, 0.05, 0.1)
    keep(job, job.run(), tmp_path)
    metrics = load("digits_cnn", tmp_path)[job.key]["metrics"]
    assert metrics["train"]["loss"] is None
    assert metrics["top_eigenvalue"] is None


def test_the_cost_of_a_step_counts_both_passes_of_sam():
    counted = {mode: operations(job) for mode, job in CostJob("digits_cnn").jobs().items()}
    assert counted["sam"] == 2 * counted["stock"]
    # Of 680 steps 84 refresh: one in 10, and 16 more. A product takes 3.2 forward and backward passes of half a batch.
    assert counted["paper"] / counted["stock"] == pytest.approx(2.195, abs=0.005)


def test_default_modes():
    assert set(protocol.default_modes(DIGITS)) == set(tasks.MODES_OF_FIRST_TASKS)
    assert "paper_norm_kept" not in protocol.default_modes(tasks.TASKS["movies"])
    for task in tasks.TASKS.values():
        assert set(task.modes) <= set(ALL_MODES)
    assert set(protocol.default_modes(tasks.TASKS["digits_vit_wrong40"])) == set(tasks.MODES_OF_LATER_TASKS)

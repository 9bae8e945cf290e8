"""Sweeps: their runs, and the tables of forgetting from made-up results."""

import math
from dataclasses import replace

import decision
import forgetting
import pytest
import report
import run
import tasks
from intervals import paired_difference
from protocol import axes, grid_jobs, reporting_jobs
from records import load, save
from training import Job

from tests.experiments.helpers import keep

TASK = "movie_text_forgetting_lora"
SEEDS = range(5)
RATES = tasks.TASKS[TASK].learning_rates


def record(job, loss, rise, seconds=10.0):
    """Return a run's record: the loss on documentation was 3 before training."""

    def at(value):
        return {"loss": value, "perplexity": math.exp(value)}

    return {
        "task": job.task,
        "seed": job.seed,
        "settings": job.settings(),
        "metrics": {"before": {"test": at(6), "elsewhere": at(3)}, "test": at(loss), "elsewhere": at(3 + rise)},
        "cost": {"steps": 26, "train_cpu_seconds": seconds},
    }


# Loss on the new text and rise of the other, by learning rate. The largest one overfits.
CURVES = {
    "stock": ([5.0, 4.0, 3.0, 3.5], [0.0, 0.1, 0.4, 2.0]),
    "sam": ([5.1, 4.5, 3.5, 3.2], [0.0, 0.03, 0.2, 0.25]),
    "one_pass": ([4.5, 4.0, 4.2, 2.9], [0.06, 0.12, 0.9, 0.9]),
}
SECONDS = {"stock": 10.0, "sam": 20.0, "one_pass": 12.0}


def grids(modes):
    return {mode: axes(tasks.TASKS[TASK], mode) for mode in modes}


@pytest.fixture
def results(tmp_path):
    for job in grid_jobs(TASK, "sweep", grids(CURVES), SEEDS):
        losses, rises = CURVES[job.mode]
        point = RATES.index(job.learning_rate)
        noise = 0.001 * ((3 * job.seed + len(job.mode)) % 5)  # of the rise, another one in each mode and seed
        keep(job, record(job, losses[point] + 0.01 * job.seed, rises[point] + noise, SECONDS[job.mode]), tmp_path)
    return tmp_path


@pytest.fixture
def runs(results):
    return report.load_all(results)[TASK, "sweep"]


class TestJobs:
    def test_every_point_of_every_mode_with_every_seed(self, tmp_path):
        jobs, waiting = reporting_jobs(TASK, "sweep", ["stock", "sam", "one_pass"], [1, 0], tmp_path)
        assert waiting == []
        assert [job.seed for job in jobs] == [1] * 12 + [0] * 12
        assert [(job.learning_rate, job.rho) for job in jobs[:3]] == [
            (RATES[0], None),
            (RATES[0], 0.01),
            (RATES[0], 0.05),
        ]
        assert {job.learning_rate for job in jobs} == set(RATES)
        assert len({job.key for job in jobs}) == len(jobs)
        assert str(jobs[1]) == f"{TASK}, sweep, sam, seed 1, learning rate {RATES[0]:g}, rho 0.01"

    def test_the_command_runs_these_alone(self, tmp_path, monkeypatch):
        given = []
        monkeypatch.setattr(run, "run_all", lambda jobs, *_: given.extend(jobs) or [])
        options = ["--tasks", TASK, "--settings", "tuned", "fixed", "--results", str(tmp_path)]
        assert run.main(options) == 0
        assert given == grid_jobs(TASK, "sweep", grids(["stock", "sam", "one_pass"]), SEEDS)

    def test_longer_runs_are_refused(self, capsys):
        with pytest.raises(SystemExit):
            run.parse(["--tasks", TASK, "--modes", "sam", "sam_long"])
        assert f"--modes has ['sam_long'], but {TASK} has equal steps in all modes" in capsys.readouterr().err

    def test_a_run_is_scored_before_and_after(self, monkeypatch, tmp_path):
        digits = tasks.TASKS["digits_cnn"]

        def prepare(seed):
            prepared = digits.prepare(seed)
            return replace(prepared, splits={**prepared.splits, "elsewhere": prepared.splits["train"][:50]})

        monkeypatch.setitem(tasks.TASKS, "digits_cnn", replace(digits, prepare=prepare))
        job = Job("digits_cnn", "sweep", "sam", 0, 0.05, 0.1, 2)
        found = job.run()
        assert set(found["metrics"]) == {"before", "test", "elsewhere"}
        assert found["metrics"]["before"]["test"]["accuracy"] < 0.3 < found["metrics"]["test"]["accuracy"]
        assert found["metrics"]["before"]["elsewhere"] != found["metrics"]["elsewhere"]
        assert found["cost"]["forward_passes"] == 2 * found["cost"]["steps"] == 68
        # What is measured before training does not change it.
        assert replace(job, part="fixed").run()["metrics"]["test"] == found["metrics"]["test"]
        save(found, job.key, job.task, tmp_path)
        assert list(report.runs_of(load(job.task, tmp_path), "sweep")["sam"]) == [(0.05, 0)]


class TestEqualLoss:
    def test_a_curve_ends_where_the_loss_rises(self, runs):
        assert list(forgetting.curve(runs["stock"], 0)) == list(RATES[:3])
        points = forgetting.curve(runs["one_pass"], 0)
        assert list(points) == [RATES[0], RATES[1], RATES[3]]
        assert points[RATES[1]] == pytest.approx((4.0, 0.12 + 0.003))

    def test_by_hand(self, runs):
        # Halfway between stock's losses of 4 and 3, and at 0.8 of the way, its rises are 0.25 and 0.34; halfway between
        # 5 and 4, 0.05. SAM's loss of 5.1 is beyond stock's. Noise of seed 0: 0 for stock, 0.003 for SAM and one pass.
        noise = {mode: 0.001 * (len(mode) % 5) for mode in CURVES}
        expected = {RATES[1]: 0.03 - 0.05, RATES[2]: 0.2 - 0.25, RATES[3]: 0.25 - 0.34}
        found = {rate: value for (rate, seed), value in forgetting.beyond_stock(runs, "sam").items() if seed == 0}
        assert found == pytest.approx({rate: value + noise["sam"] - noise["stock"] for rate, value in expected.items()})
        # One pass: 4.5 and 4.0 are within, 4.2 is no point of its curve, 2.9 is beyond.
        found = {rate: value for (rate, seed), value in forgetting.beyond_stock(runs, "one_pass").items() if seed == 0}
        assert found == pytest.approx({RATES[0]: 0.013, RATES[1]: 0.023})

    def test_stock_is_at_its_own_curve(self, runs):
        assert set(forgetting.beyond_stock(runs, "stock").values()) == {0.0}

    def test_a_run_that_diverged_is_no_point(self, runs):
        for split in ("test", "elsewhere"):
            diverged = {**runs["sam"]}
            metrics = diverged[RATES[1], 0]["metrics"]
            run = {**diverged[RATES[1], 0], "metrics": {**metrics, split: {"loss": None, "perplexity": None}}}
            diverged[RATES[1], 0] = run
            assert RATES[1] not in forgetting.curve(diverged, 0)
            assert "| `sam` |" in forgetting.forgetting({**runs, "sam": diverged})

    def test_nothing_to_compare_with(self, runs):
        assert forgetting.beyond_stock({"sam": runs["sam"]}, "sam") == {}


def rows(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


class TestTables:
    def test_every_run_is_in_a_row(self, runs):
        first, *found = rows(forgetting.runs_table(runs))
        assert first[:2] == ["before training", ""]
        assert [row[0] for row in found] == [f"`{mode}`" for mode in CURVES for _ in RATES]
        assert found[5][1] == f"{RATES[1]:g}, 0.01"
        beyond = forgetting.at(RATES[1], forgetting.beyond_stock(runs, "sam"))
        difference = str(paired_difference(beyond, dict.fromkeys(SEEDS, 0.0)))
        assert found[5][6:] == [difference, "5", "20 ± 0"]
        assert [row[7] for row in found[4:8]] == ["0", "5", "5", "5"]

    def test_at_equal_loss(self, runs):
        (sam, *numbers), (one_pass, *_, verdict) = rows(forgetting.equal_loss_table(runs))
        assert (sam, one_pass) == ("`sam`", "`one_pass`")
        assert numbers[:3] == ["2.00", "15 of 20", "5"]
        means = forgetting.by_seed(forgetting.beyond_stock(runs, "sam"))
        assert means[0] == pytest.approx((-0.02 - 0.05 - 0.09) / 3 + 0.003)
        assert numbers[3] == str(paired_difference(means, dict.fromkeys(SEEDS, 0.0)))
        assert (numbers[-1], verdict) == ("lower", "higher")

    def test_the_report_has_them_apart_from_the_others(self, results):
        found = report.load_all(results)
        assert report.sweeps(found).startswith(f"### {TASK}\n\n| mode |")
        assert report.report(found, results) == "There are no results yet."
        assert report.sweeps({key: {"sam": runs["sam"]} for key, runs in found.items()}) == "There are no results yet."

    def test_the_decision(self, results):
        text = decision.decisions(report.load_all(results))
        row = next(line for line in text.splitlines() if "must not forget" in line and "LoRA" in line)
        assert row.endswith("| not measured yet | **SAM** |")
        assert ", 2.0x |" in row
        assert "\n- finetuning that must not forget what the model knew" in text  # all weights were not measured
        fewer = {(TASK, "sweep"): {mode: {} for mode in CURVES}}
        situation = next(each for each in decision.SITUATIONS if each.task == TASK)
        assert decision.row_of(situation, fewer) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trainable"), [(TASK, 2_442_240), ("movie_text_forgetting", 134_515_008)])
def test_movie_text_and_documentation(name, trainable):
    prepared = tasks.TASKS[name].prepare(0)
    assert sum(weight.numel() for weight in prepared.model.parameters() if weight.requires_grad) == trainable
    assert {len(row) for row in prepared.splits["train"]["input_ids"][:-1]} == {64}
    known = prepared.splits["elsewhere"]
    assert set(known.column_names) == set(prepared.splits["train"].column_names)
    assert len(known) >= 10
    assert max(map(len, known["input_ids"])) == 256
    assert "data" in prepared.settings["processing_class"].decode(known["input_ids"][0])

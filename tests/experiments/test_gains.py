"""The tables of the tasks with wrong labels, and the table of decisions, from made-up results."""

import decision
import figures
import gains
import intervals
import pytest
import report
import tables
from records import save

TASK = "digits_cnn_wrong40"
SEEDS = range(5)


def record(seed, mode, final, best_clean=0.9, best_wrong=0.8, seconds=10.0):
    """Return a run's record: its third epoch is the best on clean validation labels, its second on wrong ones."""
    test = [0.1, best_wrong, best_clean, final]
    scores = {"loss": 1 - final, "accuracy": final, "ece": final / 10}
    curves = {
        "validation": {"accuracy": [0.2, 0.5, 0.7, 0.6]},
        "wrong_validation": {"accuracy": [0.2, 0.5, 0.4, 0.3]},
        "test": {"accuracy": test},
    }
    xsam = None if mode.startswith("stock") else {"rho": 0.1}
    return {
        "task": TASK,
        "seed": seed,
        "settings": {"learning_rate": 0.05, "xsam": xsam},
        "metrics": {
            "test": scores,
            "top_eigenvalue": 10 * final,
            "epochs": curves,
            "damage": {kind: {"loss": 2.0, "accuracy": 0.75 * final} for kind in gains.KINDS},
        },
        "cost": {"steps": 680, "train_cpu_seconds": seconds},
    }


def noise(seed):
    return 0.001 * ((7 * seed) % 5)


@pytest.fixture
def results(tmp_path):
    runs = {
        "stock": (0.70, 10.0),
        "sam": (0.85, 21.0),
        "one_pass": (0.86, 13.0),
        "one_pass_differences": (0.8, 13.5),
        "one_pass_random": (0.79, 10.5),
        "paper": (0.851, 25.0),
        "stock_long": (0.71, 25.0),
    }
    for mode, (final, seconds) in runs.items():
        for seed in SEEDS:
            value = final + noise(seed + len(mode))
            save(record(seed, mode, value, seconds=seconds), f"tuned/{mode}/{seed}", TASK, tmp_path)
    return tmp_path


@pytest.fixture
def runs(results):
    return report.load_all(results)[TASK, "tuned"]


def rows(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_the_best_epoch_is_the_first_one(runs):
    run = runs["stock"][0]
    assert gains.best_epoch(run, gains.CLEAN) == 2
    assert gains.best_epoch(run, gains.WRONG) == 1
    run["metrics"]["epochs"]["validation"]["accuracy"] = [0.7, 0.5, 0.7, 0.6]
    assert gains.best_epoch(run, gains.CLEAN) == 0
    assert gains.stopped_early({0: run}, gains.CLEAN) == {0: 0.1}


def test_the_price_is_relative_to_the_stock_optimizer(runs):
    assert gains.price(runs, "sam") == pytest.approx(2.1)
    assert gains.price(runs, "stock") == 1.0


def test_last_epoch(runs):
    found = {row[0]: row[1:] for row in rows(gains.last_epoch_table(TASK, runs))}
    assert list(found)[:3] == [
        "`stock`",
        "`stock`, stopped on clean validation labels",
        "`stock`, stopped on wrong validation labels",
    ]
    assert found["`stock`"][3:5] == ["-", "-"]
    n, time, accuracy, difference, p, *_ = found["`sam`"]
    values = {mode: {seed: run["metrics"]["test"]["accuracy"] for seed, run in runs[mode].items()} for mode in runs}
    expected = intervals.paired_difference(values["sam"], values["stock"])
    assert (n, time, difference) == ("5", "2.10", str(expected))
    assert accuracy == "0.8520 ± 0.0016"
    # Six rows are compared with the stock optimizer: its two early stops and four modes.
    assert float(p) >= expected.p
    assert found["`stock`, stopped on wrong validation labels"][2] == "0.8 ± 0"


def test_pairs_are_of_modes_that_ran(runs):
    text = gains.pairs_table(TASK, runs)
    assert f"`one_pass` {gains.MINUS} `sam`" in text
    assert "projection" not in text


def test_what_tuning_saw():
    records = {
        f"tuning/{mode}/{rate}_{seed}": {
            "settings": {"learning_rate": rate, "xsam": {"rho": 0.1} if mode == "sam" else None},
            "metrics": {"validation": {"accuracy": 0.5 + rate + 0.02 * seed}},
        }
        for mode, rate, seed in (("stock", 0.2, 0), ("stock", 0.1, 0), ("stock", 0.1, 1), ("sam", 0.1, 0))
    }
    assert rows(tables.tuning_table(TASK, records)) == [
        ["`stock`", "0.1: 0.610; 0.2: 0.700"],
        ["`sam`", "0.1, 0.1: 0.600"],
    ]


def test_damage(runs):
    change = {row[0]: row for row in rows(gains.robustness_table(runs, "int3"))}
    assert change["`sam`"][3] == "-0.21300 ± 0.00040"  # a quarter of 0.8520 ± 0.0016
    before_and_after = {row[0]: row[1:3] for row in rows(gains.damage_table(runs))}
    assert before_and_after["`sam`"] == ["0.1480 ± 0.0016, 0.8520 ± 0.0016", "2 ± 0, 0.6390 ± 0.0012"]


def test_the_first_page_has_tasks_with_five_seeds_of_each_mode(results, runs):
    head, _, *lines = report.first_page({(TASK, "tuned"): runs}).splitlines()
    assert head == "|  | CNN, 40% wrong |"
    assert lines[0] == "| stock Trainer | 0.702, 1.0x |"
    assert lines[7] == "| stock Trainer, best epoch on wrong validation labels | 0.800, 1.0x |"
    del runs["sam"][3], runs["paper"]
    assert report.first_page({(TASK, "tuned"): runs}).splitlines()[4] == "| SAM | - |"
    del runs["stock"][3]
    assert report.first_page({(TASK, "tuned"): runs}) == "There are no results yet."


def test_the_figure(runs, tmp_path):
    figures.draw_gains({TASK: runs}, tmp_path / "gains.svg")
    drawn = (tmp_path / "gains.svg").read_text()
    figures.draw_gains({TASK: runs}, tmp_path / "again.svg")
    assert "<!-- one_pass -->" in drawn
    assert "<!-- stock -->" not in drawn
    assert (tmp_path / "again.svg").read_text() == drawn


def test_all_tables(runs):
    text = gains.gains(TASK, runs)
    assert "`one_pass` 0.05, 0.1" in text
    assert "product" not in text


class TestDecision:
    def situation(self, kind):
        situations = {each.text: each for each in decision.SITUATIONS}
        return next(
            each for text, each in situations.items() if text.startswith("40%") and "CNN" in text and kind in text
        )

    def test_the_cheapest_of_those_that_win(self, results):
        found = report.load_all(results)
        _, baseline, *cells, use = decision.row_of(self.situation("last epoch is kept"), found)
        assert baseline == "`stock`, stopped on wrong: accuracy 0.8"
        assert cells[0].endswith(", 2.1x")
        assert use == "**one pass**"

    def test_none_wins_against_early_stopping(self, results):
        row = decision.row_of(self.situation("clean ones"), report.load_all(results))
        assert row[1] == "`stock`, stopped on clean: accuracy 0.9"
        assert row[-1] == "no gain shown"

    def test_a_dearer_mode_has_to_be_better(self):
        times = {"stock": 1.0, "one_pass": 1.2, "sam": 2.0}
        runs = {mode: {seed: {"cost": {"train_cpu_seconds": time}} for seed in SEEDS} for mode, time in times.items()}
        reference = dict.fromkeys(SEEDS, 0.5)
        for gain, choice in ((0.002, "one pass"), (0.1, "SAM")):
            numbers = {
                "one_pass": {seed: 0.7 + 0.002 * (seed % 3) for seed in SEEDS},
                "sam": {seed: 0.7 + gain + 0.004 * (seed % 2) for seed in SEEDS},
            }
            differences = {mode: intervals.paired_difference(each, reference) for mode, each in numbers.items()}
            assert decision.named(differences, numbers, runs, 1) == f"**{choice}**"
            assert decision.named(differences, numbers, runs, -1) == "do not use it"

    def test_what_was_not_run_is_listed(self, results):
        text = decision.decisions(report.load_all(results))
        _, missing = text.split("Not measured yet:")
        assert text.count("\n| 40%") == 4
        assert missing.count("\n- 60% of the labels wrong, CNN from scratch\n") == 1
        assert "\n- LoRA of a language model" in missing
        assert "\n- 40% of the labels wrong, CNN" not in missing
        assert all(decision.row_of(situation, {}) is None for situation in decision.SITUATIONS)

    def test_runs_that_lost_the_eigenvector_do_not_count(self):
        runs = {mode: {seed: record(seed, mode, 0.9) for seed in SEEDS} for mode in ("sam", "paper")}
        assert decision.measured("sam", "movies", runs)
        assert not decision.measured("paper", "movies", runs)
        assert all(decision.measured("paper", task, runs) for task in (TASK, "digits_cnn", "digits_vit"))

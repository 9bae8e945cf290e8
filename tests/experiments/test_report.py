"""The report: its arithmetic, and the pages that it writes."""

import math

import claims
import intervals
import numpy as np
import pytest
import report
import tables
from records import RESULTS
from scipy import stats
from training import Job

from tests.experiments.helpers import keep, remove


class TestReport:
    def test_against_scipy(self):
        draw = np.random.default_rng(0)
        for n in (2, 3, 5, 10):
            ours, theirs = draw.normal(size=(2, n))
            difference = intervals.paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
            reference = stats.ttest_rel(ours, theirs)
            interval = reference.confidence_interval(0.95)
            assert difference.n == n
            expected = [np.mean(ours - theirs), interval.low, interval.high, reference.pvalue]
            np.testing.assert_allclose(difference[1:], expected, rtol=1e-9)
            assert (difference.verdict != "within noise") == (reference.pvalue < 0.05)
            np.testing.assert_allclose(intervals.mean_and_deviation(ours), [ours.mean(), ours.std(ddof=1)])

    def test_by_hand(self):
        # Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653, so 2 -+ 4.302653 / sqrt(3). t is sqrt(12),
        # and p with two degrees of freedom 1 - t / sqrt(2 + t^2).
        difference = intervals.paired_difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
        np.testing.assert_allclose(difference, [3, 2.0, -0.4841377, 4.4841377, 1 - math.sqrt(12 / 14)], rtol=1e-6)
        assert difference.verdict == "within noise"
        assert intervals.paired_difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 0.0, 1: 2.1, 2: 3.9}).verdict == "higher"
        assert intervals.paired_difference({0: 0.0, 1: 2.1, 2: 3.9}, {0: 2.0, 1: 4.0, 2: 6.0}).verdict == "lower"

    def test_holm_by_hand(self):
        # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04, and the last is not below 0.06.
        found = intervals.holm([0.01, 0.04, math.nan, 0.03, 0.005])
        np.testing.assert_allclose(found, [0.03, 0.06, math.nan, 0.06, 0.02], rtol=1e-12)
        assert intervals.holm([0.6, 0.7]) == [1.0, 1.0]
        assert intervals.holm([]) == []

    def test_pairs_are_of_the_same_seed(self):
        ours, theirs = {4: 10.0, 0: 1.0, 2: 3.0, 9: 100.0}, {0: 0.5, 7: -100.0, 2: 2.0, 4: 9.25}
        difference = intervals.paired_difference(ours, theirs)
        reference = stats.ttest_rel([1.0, 3.0, 10.0], [0.5, 2.0, 9.25]).confidence_interval(0.95)
        np.testing.assert_allclose(difference[:4], [3, 0.75, reference.low, reference.high])

    def test_one_seed_decides_nothing(self):
        assert intervals.paired_difference({0: 1.0}, {0: 2.0}).verdict == "too few seeds"
        assert str(intervals.paired_difference({0: 1.0}, {0: 2.0})) == "-1"
        assert intervals.paired_difference({0: 1.0}, {1: 2.0}).verdict == "too few seeds"

    def record(self, results, mode, seed, accuracy, eigenvalue, part="fixed"):
        job = Job("digits_cnn", part, mode, seed, 0.05, None if mode == "stock" else 0.05, 40)
        record = {
            "seed": seed,
            "settings": job.settings(),
            "metrics": {
                "test": {"accuracy": accuracy, "loss": accuracy},
                "top_eigenvalue": eigenvalue,
                "loss_gap": 0.5,
            },
            "cost": {"steps": 680, "train_cpu_seconds": 10.0},
        }
        keep(job, record, results)

    def test_the_page(self, tmp_path):
        results, page = tmp_path / "results", tmp_path / "experiments" / "README.md"
        page.parent.mkdir()
        empty = "<!-- {0}: begin --><!-- {0}: end -->"
        old = "\n".join(map(empty.format, ("overview", "wrong_labels", "forgetting")))
        old += "\n<!-- results: begin -->\nold\n<!-- results: end -->"
        page.write_text(f"before\n{old}\nafter\n")
        (tmp_path / "README.md").write_text(empty.format("experiments") + empty.format("wrong_labels"))
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / "when-to-use.md").write_text(empty.format("decisions"))
        arguments = ["--results", str(results), "--root", str(tmp_path)]
        report.main(arguments)
        assert "There are no results yet." in page.read_text()
        for seed, (sam, paper) in enumerate([(4.0, 5.1), (4.2, 5.2), (4.1, 5.3)]):
            self.record(results, "sam", seed, 0.90 + 0.01 * seed, sam)
            self.record(results, "paper", seed, 0.90 - 0.01 * seed, paper)
            self.record(results, "aligned_1", seed, 0.91 + 0.011 * seed, sam - 1)
        self.record(results, "paper", 7, 0.1, None)
        report.main(arguments)
        text = page.read_text()
        assert text.startswith("before\n<!-- overview: begin -->\n")
        assert text.endswith("<!-- results: end -->\nafter\n")
        assert "\nold\n" not in text
        rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
        found = {row[2]: row[3:] for row in rows if row[0] == "digits_cnn" and row[3] == "top_eigenvalue"}
        interval = stats.ttest_rel([5.1, 5.2, 5.3], [4.0, 4.2, 4.1]).confidence_interval(0.95)
        shown = f"+1.1 [{interval.low:+.3g}, {interval.high:+.3g}]"
        assert found[f"paper {tables.MINUS} sam"] == ["top_eigenvalue", shown, "3", "higher", "the opposite"]
        assert found[f"aligned_1 {tables.MINUS} paper"][2:] == ["3", "lower", "yes"]
        accuracies = {row[2]: row[3:] for row in rows if row[0] == "digits_cnn" and row[3] == "accuracy"}
        assert accuracies[f"paper {tables.MINUS} sam"][2:] == ["3", "within noise", "open"]
        assert accuracies[f"aligned_1 {tables.MINUS} sam"][2:] == ["3", "higher", "yes"]
        assert next(row for row in rows if row[0] == "paper")[4] == "0.69 ± 0.40"
        assert b"<svg" in (page.parent / "results.svg").read_bytes()
        report.main(arguments)
        assert page.read_text() == text

    def test_the_overviews_have_tasks_with_five_seeds_of_each_mode(self, tmp_path):
        for mode in claims.LABELS:
            for seed in range(5):
                self.record(tmp_path, mode, seed, 0.9 + seed / 100, 40.0 + 10 * seed, part="tuned")
        expected = {claims.overview: "0.920 ± 0.016, 60 ± 16", claims.short: "0.920"}
        for of, cell in expected.items():
            head, _, *rows = of(report.load_all(tmp_path)).splitlines()
            assert head == f"|  | {claims.TITLES['digits_cnn']} |"
            assert rows[0] == f"| stock Trainer | {cell} |"
            assert len(rows) == len(claims.LABELS if of is claims.overview else claims.FIRST_PAGE)
        remove(Job("digits_cnn", "tuned", "sam_long", 4, 0.05, 0.05, 40), tmp_path)
        for of in expected:
            assert "CNN" not in of(report.load_all(tmp_path))

    def test_a_page_without_markers_is_refused(self, tmp_path):
        (tmp_path / "experiments").mkdir()
        (tmp_path / "experiments" / "README.md").write_text("text")
        with pytest.raises(ValueError, match=r"README\.md has the markers .*results: begin.* 0 times"):
            report.main(["--results", str(tmp_path), "--root", str(tmp_path)])

    def test_the_committed_pages_are_of_the_committed_results(self):
        for page, text in report.pages(report.load_all(RESULTS), RESULTS, report.ROOT).items():
            assert page.read_text(encoding="utf-8") == text

"""Run the experiments, or what is missing of them: one process a core.

    python experiments/run.py --tasks digits_cnn --seeds 0 1 2 3 4

What has a result is not run again, so an interrupted command goes on where it is given again.
"""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from cost import CostJob
from modes import ALL_MODES, LONG
from protocol import default_modes, is_done, reporting_jobs, tuning_jobs
from records import RESULTS, load, save
from tasks import TASKS
from training import Job

AnyJob = Job | CostJob


def error_path(job: AnyJob, results: Path) -> Path:
    """Return where the traceback of a job that failed is kept until it succeeds."""
    return results / f"{job.task}.{job.key.replace('/', '.')}.error.txt"


def work(job: AnyJob, results: Path) -> None:
    """Run the job in this process of its own, and write its result or its traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=end_with_parent, daemon=True).start()
    failure = error_path(job, results)
    failure.unlink(missing_ok=True)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            save(job.run(), job.key, job.task, results)
    except Exception:
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


def end_with_parent() -> None:
    """Wait until the parent is gone, killed for example, and end: the next command runs the job again."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # workers have one
    parent.join()
    os._exit(1)


@dataclass
class Progress:
    """Prints a line for each job, with an estimate of the time that is left.

    Attributes:
        total: jobs to run.
        workers: that run side by side.
        seconds: how long jobs of each task and mode took.
    """

    total: int
    workers: int
    done: int = 0
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def ended(self, job: AnyJob, seconds: float, outcome: str, left: Sequence[AnyJob]) -> None:
        """Print what became of `job`, and the time for what is left."""
        self.done += 1
        self.seconds[job.task, job.mode].append(seconds)
        line = f"[{self.done}/{self.total}] {job}: {outcome} in {seconds:.0f} s"
        print(f"{line}, {self.estimate(left) / 60:.1f} min left" if left else line, flush=True)

    def estimate(self, left: Sequence[AnyJob]) -> float:
        """Return the seconds for the jobs left: a mean over those of the same task and mode, of the task, or of all."""

        def mean(task: str | None, mode: str | None) -> float | None:
            known = [
                second
                for (a, b), seconds in self.seconds.items()
                if task in (a, None) and mode in (b, None)
                for second in seconds
            ]
            return sum(known) / len(known) if known else None

        guesses = [mean(job.task, job.mode) or mean(job.task, None) or mean(None, None) or 0.0 for job in left]
        return sum(guesses) / self.workers


def run_all(jobs: Sequence[AnyJob], results: Path, workers: int) -> list[AnyJob]:
    """Run the jobs in their order, `workers` at a time; return those that failed.

    A job that fails, or whose process dies, has a traceback in its `.error.txt`. The others go on.

    Raises:
        KeyboardInterrupt: for Ctrl-C, once the workers have ended.
    """
    context = multiprocessing.get_context("fork")  # of a process that has imported everything and computed nothing
    waiting, running, failed = deque(jobs), {}, []
    progress = Progress(len(jobs), workers)
    # Noted, not raised: Python swallows an exception that comes within a fork.
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        while waiting or running:
            if interrupts:
                raise KeyboardInterrupt
            while waiting and len(running) < workers:
                job = waiting.popleft()
                process = context.Process(target=work, args=(job, results), daemon=True)
                process.start()
                running[process.sentinel] = (process, job, time.monotonic())
            for sentinel in wait(list(running), timeout=0.2):
                process, job, began = running.pop(sentinel)
                process.join()
                if job.key not in load(job.task, results):
                    failed.append(job)
                left = [*waiting, *(job for _, job, _ in running.values())]
                progress.ended(job, time.monotonic() - began, outcome(process, job, results), left)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()
        signal.signal(signal.SIGINT, handler)
    return failed


def outcome(process: BaseProcess, job: AnyJob, results: Path) -> str:
    """Return in a few words how a job ended; leave a note where its process could not."""
    record = load(job.task, results).get(job.key)
    if record:
        metrics = record.get("metrics", {})
        measured = metrics.get("test") or metrics.get("validation") or {}
        return " ".join(f"{name} {value:.4g}" for name, value in measured.items() if value is not None) or "done"
    failure = error_path(job, results)
    if not failure.exists():
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(f"The process ended with exit code {process.exitcode}.\n", encoding="utf-8")
    return f"FAILED ({failure.read_text(encoding='utf-8').strip().splitlines()[-1]})"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--modes", nargs="+", choices=ALL_MODES, metavar="MODE", help=", ".join(ALL_MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=["tuned", "fixed"],
        default=["tuned"],
        help="learning rate and rho: each mode's best on the validation split, or the task's own for all modes; tasks "
        "of forgetting run all of their learning rates instead",
    )
    parser.add_argument("--epochs", type=float, help="train for so many epochs, to try the command out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes side by side, a core each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    options = parser.parse_args(argv)
    swept = [name for name in options.tasks if TASKS[name].swept]
    if swept and (longer := [mode for mode in options.modes or () if mode.endswith(LONG)]):
        parser.error(
            f"--modes has {longer}, but {swept[0]} has equal steps in all modes; leave them out or name other --tasks."
        )
    if clash := {seed for name in options.tasks for seed in TASKS[name].tuning_seeds} & set(options.seeds):
        parser.error(f"--seeds has {sorted(clash)}, which the settings are chosen by; report others.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of each task: the cost of a step, the runs for tuning, the runs that are reported."""
    options = parse(argv)
    failed: list[AnyJob] = []
    missing: list[str] = []

    def run_missing(jobs: Sequence[AnyJob], workers: int) -> None:
        to_do = [job for job in jobs if not is_done(job, options.results)]
        if jobs:
            print(f"{len(jobs) - len(to_do)} of {len(jobs)} runs have results.", flush=True)
        failed.extend(run_all(to_do, options.results, workers))

    try:
        for name in options.tasks:
            modes = options.modes or default_modes(TASKS[name])
            if any(mode.endswith(LONG) for mode in modes):
                run_missing([CostJob(name)], workers=1)  # undisturbed
            parts = ["sweep"] if TASKS[name].swept else options.settings
            if "tuned" in parts:
                known: list[AnyJob] = []
                # The results may widen the grid.
                while (jobs := tuning_jobs(name, modes, options.results, options.epochs)) != known:
                    run_missing(jobs, options.workers)
                    known = jobs
            reporting: list[AnyJob] = []
            for part in parts:
                jobs, waiting = reporting_jobs(name, part, modes, options.seeds, options.results, options.epochs)
                missing += [f"{name}, {part}, {mode}" for mode in waiting]
                reporting += jobs
            run_missing(reporting, options.workers)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for job in failed:
        print(f"Failed: {job}; see {error_path(job, options.results)}", file=sys.stderr)
    for name in missing:
        print(f"Not run, for what it waits for failed: {name}", file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())

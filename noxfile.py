"""`nox --session oldest`: the core's tests with the oldest releases that hf_xsam supports; `deepspeed`: its own."""

import nox

OLDEST = ["transformers==5.0.0", "accelerate==1.4.0"]
# What the stock Trainer of transformers 5.0 cannot do either.
UPSTREAM = [
    # To resume equals the uninterrupted run bit for bit.
    "tests/saving/test_checkpoint.py::TestResume::test_equals_the_uninterrupted_run",
    # To heed accelerate's `sync_each_batch`.
    "tests/step/test_replay.py::test_micro_batches_synchronize_as_the_trainers_do",
    # To take data in order (`train_sampling_strategy`), and dynamic RoPE as it is in later releases.
    "tests/step/test_unusual_steps.py::test_a_later_batch_without_second_derivative_takes_differences_from_there_on",
    "tests/step/test_unusual_steps.py::TestRows::test_a_later_batch_of_such_rows_is_named",
    "tests/step/test_same_step.py::test_dynamic_rope",
]


@nox.session
def oldest(session: nox.Session) -> None:
    session.install("torch==2.13.0")
    session.install("-e", ".[dev]", *OLDEST)
    session.run("pytest", "-q", "@tests/core.txt", *(f"--deselect={test}" for test in UPSTREAM))


@nox.session(default=False)
def deepspeed(session: nox.Session) -> None:
    """DeepSpeed's ZeRO on the CPU, over gloo; DeepSpeed compiles an extension at first, for which it takes g++."""
    session.install("torch==2.13.0")
    session.install("-e", ".[deepspeed,dev,recipes,trl]", "-c", "constraints.txt")
    session.run("pytest", "-q", "--numprocesses=0", "tests/integrations/test_deepspeed.py")
    session.run("pytest", "-q", "--numprocesses=0", "tests/recipes/test_accelerate.py", "-k", "zero")

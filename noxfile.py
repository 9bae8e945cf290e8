"""`nox --session oldest`: the core's tests with the oldest releases that hf_xsam supports."""

import nox

OLDEST = ["transformers==5.0.0", "accelerate==1.4.0"]


@nox.session
def oldest(session: nox.Session) -> None:
    session.install("torch==2.13.0")
    session.install("-e", ".[dev]", *OLDEST)
    # The stock Trainer of transformers 5.0 does not equal its uninterrupted run bit for bit when it resumes.
    upstream = "tests/saving/test_checkpoint.py::TestResume::test_equals_the_uninterrupted_run"
    session.run("pytest", "-q", "@tests/core.txt", "--deselect", upstream)

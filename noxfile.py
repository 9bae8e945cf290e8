"""`nox --session oldest`: the core's tests with the oldest releases that hf_xsam supports."""

import nox

OLDEST = ["transformers==5.0.0", "accelerate==1.4.0"]


@nox.session
def oldest(session: nox.Session) -> None:
    session.install("torch==2.13.0")
    session.install("-e", ".", *OLDEST, "peft", "pytest", "scipy")
    session.run("pytest", "-q", "tests/test_golden.py", "tests/test_trainer.py", "tests/test_lora.py")

"""`nox --session oldest`: the core's tests with the oldest releases that hf_xsam supports."""

import nox

OLDEST = ["transformers==5.0.0", "accelerate==1.4.0"]


@nox.session
def oldest(session: nox.Session) -> None:
    session.install("torch==2.13.0")
    session.install("-e", ".", *OLDEST, "peft", "pytest", "pytest-xdist", "scipy")
    names = ("config", "golden", "hub", "lora", "model_card", "scope", "trainer")
    session.run("pytest", "-q", *(f"tests/test_{name}.py" for name in names))

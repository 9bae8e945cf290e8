"""When X-SAM refreshes its eigenvector."""

from hf_xsam import XSAMConfig


def refresh_steps(config: XSAMConfig, steps: int) -> list[int]:
    """Return at which of a run's steps, from 0, the eigenvector is refreshed."""
    found: list[int] = []
    for step in range(steps):
        if config.refreshes_at(step, found[-1] if found else None):
            found.append(step)
    return found

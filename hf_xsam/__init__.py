"""X-SAM (arXiv 2601.10251), sharpness-aware minimization along the Hessian's top eigenvector, for `Trainer`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import XSAMConfig
    from .sharpness.callback import XSAMCallback
    from .state import XSAMState
    from .trainer import XSAMSeq2SeqTrainer, XSAMTrainer, XSAMTrainerMixin
else:
    # Imported when they are asked for: torch and transformers take seconds, and the command line's help needs neither.
    _MODULES = {
        "XSAMCallback": "sharpness.callback",
        "XSAMConfig": "config",
        "XSAMSeq2SeqTrainer": "trainer",
        "XSAMState": "state",
        "XSAMTrainer": "trainer",
        "XSAMTrainerMixin": "trainer",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)

    def __dir__() -> list[str]:
        return [*globals(), *_MODULES]


__version__ = "0.1.0.dev0"
__all__ = ["XSAMCallback", "XSAMConfig", "XSAMSeq2SeqTrainer", "XSAMState", "XSAMTrainer", "XSAMTrainerMixin"]

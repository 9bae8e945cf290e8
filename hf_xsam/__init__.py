"""X-SAM (arXiv 2601.10251), sharpness-aware minimization along the Hessian's top eigenvector, for `Trainer`."""

from .config import XSAMConfig
from .sharpness.callback import XSAMCallback
from .state import XSAMState
from .trainer import XSAMSeq2SeqTrainer, XSAMTrainer, XSAMTrainerMixin

__version__ = "0.1.0.dev0"
__all__ = ["XSAMCallback", "XSAMConfig", "XSAMSeq2SeqTrainer", "XSAMState", "XSAMTrainer", "XSAMTrainerMixin"]

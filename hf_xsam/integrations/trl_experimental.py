"""X-SAM in trainers of `trl.experimental`: `XSAMORPOTrainer`, `XSAMCPOTrainer` and `XSAMTPOTrainer`.

Apart from `trl`'s own, because any release of TRL may change or remove them.
"""

from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.experimental.tpo import TPOTrainer

from ..trainer import XSAMTrainerMixin


class XSAMORPOTrainer(XSAMTrainerMixin, ORPOTrainer):
    """`ORPOTrainer` with X-SAM: takes `xsam_config` beside its arguments."""

    rows_are_examples = False  # a batch has the chosen answers first, then the rejected ones


class XSAMCPOTrainer(XSAMTrainerMixin, CPOTrainer):
    """`CPOTrainer` with X-SAM, for CPO, SimPO and their combination: takes `xsam_config` beside its arguments."""

    rows_are_examples = False  # as in ORPO


class XSAMTPOTrainer(XSAMTrainerMixin, TPOTrainer):
    """`TPOTrainer` with X-SAM: takes `xsam_config` beside its arguments."""

    rows_are_examples = False  # an example has a reference answer too

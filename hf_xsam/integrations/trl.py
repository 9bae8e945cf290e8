"""X-SAM in TRL's trainers: `XSAMSFTTrainer`, `XSAMDPOTrainer` and `XSAMRewardTrainer`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from ..step.side_effects import counts_undone
from ..trainer import XSAMTrainerMixin


class XSAMTRLTrainerMixin(XSAMTrainerMixin):
    """[`~hf_xsam.XSAMTrainerMixin`] for subclasses of TRL's SFT, DPO and reward trainers.

    They count tokens and collect metrics in their loss. Each training step counts once here, by its pass at the
    unperturbed weights, however often X-SAM runs it.
    """

    @contextmanager
    def _side_effects_undone(self, model: nn.Module) -> Iterator[None]:
        with counts_undone(self), super()._side_effects_undone(model):
            yield


class XSAMSFTTrainer(XSAMTRLTrainerMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `SFTTrainer`.

    TRL's fused language-model head has no second derivative, so Hessian-vector products are finite differences.
    """


class XSAMDPOTrainer(XSAMTRLTrainerMixin, DPOTrainer):
    """[`~trl.DPOTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `DPOTrainer`.

    The reference model is never perturbed. TRL's fused language-model head has no second derivative, so
    Hessian-vector products are finite differences.
    """

    rows_are_examples = False  # a batch has the chosen answers first, then the rejected ones


class XSAMRewardTrainer(XSAMTRLTrainerMixin, RewardTrainer):
    """[`~trl.RewardTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `RewardTrainer`."""

    rows_are_examples = False  # as in DPO

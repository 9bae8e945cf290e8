"""X-SAM in TRL's trainers: `XSAMSFTTrainer`, `XSAMDPOTrainer` and `XSAMRewardTrainer`."""

from trl import DPOTrainer, RewardTrainer, SFTTrainer

from ..trainer import XSAMTrainerMixin


class XSAMSFTTrainer(XSAMTrainerMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `SFTTrainer`.

    TRL's fused language-model head has no second derivative, so Hessian-vector products are finite differences.
    """


class XSAMDPOTrainer(XSAMTrainerMixin, DPOTrainer):
    """[`~trl.DPOTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `DPOTrainer`.

    The reference model is never perturbed. TRL's fused language-model head has no second derivative, so
    Hessian-vector products are finite differences.
    """

    rows_are_examples = False  # a batch has the chosen answers first, then the rejected ones


class XSAMRewardTrainer(XSAMTrainerMixin, RewardTrainer):
    """[`~trl.RewardTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `RewardTrainer`."""

    rows_are_examples = False  # as in DPO

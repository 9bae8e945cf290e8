"""X-SAM in TRL's trainers: `XSAMSFTTrainer`, `XSAMDPOTrainer`, `XSAMKTOTrainer` and `XSAMRewardTrainer`."""

from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

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


class XSAMKTOTrainer(XSAMTrainerMixin, KTOTrainer):
    """[`~trl.KTOTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `KTOTrainer`.

    The batch holds the mismatched answers that the KL divergence is estimated on, so each pass estimates it on the same
    ones, at its own weights. KTO takes the estimate for a constant: v is the top eigenvector of its gradient's
    derivative, which is not quite a Hessian. TRL's fused language-model head has no second derivative, so
    Hessian-vector products are finite differences.
    """

    rows_are_examples = False  # the estimate is the batch's


class XSAMRewardTrainer(XSAMTrainerMixin, RewardTrainer):
    """[`~trl.RewardTrainer`] with X-SAM: takes `xsam_config` beside the arguments of `RewardTrainer`."""

    rows_are_examples = False  # as in DPO

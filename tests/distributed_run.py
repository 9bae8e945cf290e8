"""Run by test_distributed.py in each process: a few steps of X-SAM; rank 0 saves what the test compares."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_xsam import XSAMConfig
from tests.helpers import logs_of, run
from tests.test_trainer import MeanLossTrainer, bert, sentences


class RankComparison(TrainerCallback):
    agree = True

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        gathered = trainer_state["gather"](weights).view(args.world_size, -1)
        self.agree = self.agree and bool((gathered == gathered[0]).all())


trainer_state = {}


class Ours(MeanLossTrainer):
    def train(self):
        trainer_state["gather"] = self.accelerator.gather
        return super().train()


output, hvp, ascent = sys.argv[1:]
world = int(os.environ["WORLD_SIZE"])
comparison = RankComparison()
with tempfile.TemporaryDirectory() as folder:
    trainer = run(
        bert().double(),
        sentences(32),
        folder,
        XSAMConfig(rho=0.1, alpha=0.5, eigen_interval=2, hvp=hvp, ascent=ascent, normalize_gradient=False),
        Ours,
        callbacks=[comparison],
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        average_tokens_across_devices=False,
    )
agree = comparison.agree and all(
    bool((trainer.accelerator.gather(part[None]) == part).all()) for part in trainer.xsam_state.eigenvector.values()
)
if trainer.is_world_process_zero():
    torch.save(
        {"weights": trainer.model.state_dict(), "logs": logs_of(trainer)[-1], "ranks_agree": agree},
        output,
    )
torch.distributed.barrier()
torch.distributed.destroy_process_group()

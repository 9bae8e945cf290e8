"""The controls whose v is a random direction."""

import torch
from modes import RandomDirectionTrainer
from transformers import TrainingArguments

from tests.cases import tiny_bert
from tests.helpers import examples_of


def trained(folder, seed=0, steps=3, **settings):
    model, batch = tiny_bert()
    arguments = {"max_steps": steps, "seed": seed, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    settings = {"eigen_interval": 2, "eigen_warmup_steps": 0, "replay_check": "never", **settings}
    trainer = RandomDirectionTrainer(
        model=model,
        args=TrainingArguments(str(folder), **arguments),
        train_dataset=examples_of(batch),
        xsam_config=settings,
    )
    trainer.train()
    vector = torch.cat([part.flatten() for part in trainer.xsam_state.eigenvector.values()])
    return trainer, vector


def test_a_refresh_draws_a_new_direction(tmp_path):
    one_pass = {"perturbation": "eigenvector", "alpha": 0.0, "rho": 0.1}
    trainer, last = trained(tmp_path, **one_pass)
    assert trainer.xsam_state.refreshed_at == 2
    torch.testing.assert_close(last.norm(), torch.tensor(1.0))
    _, first = trained(tmp_path, steps=2, **one_pass)
    _, other = trained(tmp_path, seed=1, **one_pass)
    limit = 6 / len(last) ** 0.5  # six standard deviations of the cosine of two random directions
    assert abs(first @ last) < limit
    assert abs(other @ last) < limit
    assert torch.equal(trained(tmp_path, **one_pass)[1], last)


def test_it_takes_the_place_of_v_in_the_correction(tmp_path):
    def weights(alpha):
        trainer, _ = trained(tmp_path, alpha=alpha, correction="projection")
        return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])

    assert not torch.equal(weights(0.2), weights(1.0))

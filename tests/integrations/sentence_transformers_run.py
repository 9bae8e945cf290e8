"""Run by test_sentence_transformers.py in each of two processes, with the folder of a tiny model."""

import sys
import tempfile

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import distributed, nn

from hf_xsam import XSAMConfig
from hf_xsam.integrations.sentence_transformers import XSAMSentenceTransformerTrainer
from tests.helpers import PLAIN, end_together, weights_of
from tests.integrations.test_sentence_transformers import LOSSES, trained


def run(name, kind, config=None):
    loss, data, method = LOSSES[name]
    with tempfile.TemporaryDirectory() as output:
        trainer = trained(sys.argv[1], output, kind, loss, data, config, per_device_train_batch_size=2)
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return trainer, method


for name in ("ranking", "cached"):
    stock, _ = run(name, SentenceTransformerTrainer)
    same, _ = run(name, XSAMSentenceTransformerTrainer, XSAMConfig(**PLAIN))
    assert torch.equal(weights_of(same.model), weights_of(stock.model))

    ours, method = run(name, XSAMSentenceTransformerTrainer, XSAMConfig(rho=0.05, eigen_interval=1))
    assert ours._xsam_steps.method == method
    weights = [weights_of(ours.model), torch.cat([v.flatten() for v in ours.xsam_state.eigenvector.values()])]
    for mine in weights:
        everyone = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(everyone, mine)
        assert torch.equal(*everyone)
    assert not torch.equal(weights[0], weights_of(stock.model))

try:
    run("softmax", XSAMSentenceTransformerTrainer)
except ValueError as error:
    assert "The loss has trainable parameters of its own" in str(error)  # noqa: PT017
    print("equal", flush=True)
end_together()

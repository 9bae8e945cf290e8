"""Run by test_sentence_transformers.py in each of two processes, with the folders of tiny models: an embedder's, and
what `test_rerankers.save_models` saves."""

import sys
import tempfile

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import distributed, nn

from hf_xsam import XSAMConfig
from hf_xsam.integrations.sentence_transformers import XSAMSentenceTransformerTrainer
from tests.helpers import PLAIN, end_together, weights_of
from tests.integrations import test_rerankers
from tests.integrations.test_sentence_transformers import LOSSES, trained

# Without the latter, the stock trainer of rerankers fails in several processes.
RERANKERS = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": False}


def run(name, kind, config=None):
    loss, data, method = LOSSES[name]
    with tempfile.TemporaryDirectory() as output:
        trainer = trained(sys.argv[1], output, kind, loss, data, config, per_device_train_batch_size=2)
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return trainer, method


def check(stock, same, ours, method):
    assert torch.equal(weights_of(same.model), weights_of(stock.model))
    assert ours._xsam_steps.method == method
    weights = [weights_of(ours.model), torch.cat([v.flatten() for v in ours.xsam_state.eigenvector.values()])]
    for mine in weights:
        everyone = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(everyone, mine)
        assert torch.equal(*everyone)
    assert not torch.equal(weights[0], weights_of(stock.model))


plain, corrected = XSAMConfig(**PLAIN), XSAMConfig(rho=0.05, eigen_interval=1)
for name in ("ranking", "cached"):
    (stock, method), (same, _), (ours, _) = (
        run(name, SentenceTransformerTrainer),
        run(name, XSAMSentenceTransformerTrainer, plain),
        run(name, XSAMSentenceTransformerTrainer, corrected),
    )
    check(stock, same, ours, method)

for name in ("scores", "lists", "splade"):
    *case, method = test_rerankers.CASES[name]
    with tempfile.TemporaryDirectory() as output:
        runs = [
            test_rerankers.trained(sys.argv[2], output, *case, config, **RERANKERS)
            for config in (None, plain, corrected)
        ]
    check(*runs, method)

try:
    run("softmax", XSAMSentenceTransformerTrainer)
except ValueError as error:
    assert "The loss has trainable parameters of its own" in str(error)  # noqa: PT017
    print("equal", flush=True)
end_together()

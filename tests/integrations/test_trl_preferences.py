"""X-SAM in TRL's other preference trainers: KTO, and the experimental ORPO, CPO and TPO."""

import logging

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from hf_xsam import XSAMConfig
from hf_xsam.integrations.trl import XSAMKTOTrainer
from hf_xsam.integrations.trl_experimental import XSAMCPOTrainer, XSAMORPOTrainer, XSAMTPOTrainer
from tests.helpers import logs_of, save_tiny_language_model, weights_of
from tests.integrations.test_trl import ACCUMULATION, PEFT, PREFERENCES, assert_equals_stock, comparable, settings

UNPAIRED = Dataset.from_dict(
    {
        "prompt": ["the film :", "a plot :", "the dull film :"] * 4,
        "completion": [" good", " fine plot", " bad", " bad", " poor", " great film"] * 2,
        "label": [True, True, True, False, False, False] * 2,
    }
)
TRIPLES = PREFERENCES.add_column("reference", [" great", " a good plot", " the poor film"] * 4)

KTO = (XSAMKTOTrainer, KTOTrainer, KTOConfig, UNPAIRED)
ORPO = (XSAMORPOTrainer, ORPOTrainer, ORPOConfig, PREFERENCES)
CPO = (XSAMCPOTrainer, CPOTrainer, CPOConfig, PREFERENCES)
TPO = (XSAMTPOTrainer, TPOTrainer, TPOConfig, TRIPLES)
EACH = pytest.mark.parametrize("method", [KTO, ORPO, CPO, TPO], ids=["kto", "orpo", "cpo", "tpo"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_language_model(tmp_path_factory.mktemp("model"))


@EACH
@PEFT
@ACCUMULATION
def test_equals_the_stock_trainer(model, tmp_path, method, accumulation, peft_config):
    ours, stock, config_class, data = method
    args = settings(config_class, tmp_path, gradient_accumulation_steps=accumulation)
    assert_equals_stock(model, ours, stock, args, data, peft_config=peft_config)


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        (KTO, {"loss_type": "apo_zero_unpaired"}),
        (KTO, {"precompute_ref_log_probs": True}),
        (KTO, {"desirable_weight": 2.0}),
        (CPO, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        (CPO, {"loss_type": "ipo"}),
        (TPO, {"loss_type": "tpo-l"}),
    ],
    ids=["apo", "precomputed", "weights", "simpo", "ipo", "tpo-l"],
)
def test_equals_it_in_every_variant(model, tmp_path, method, variant):
    ours, stock, config_class, data = method
    args = settings(config_class, tmp_path, gradient_accumulation_steps=2, **variant)
    assert_equals_stock(model, ours, stock, args, data)


@EACH
def test_a_corrected_step_counts_once(model, tmp_path, method, caplog):
    ours, stock, config_class, data = method
    args = settings(config_class, tmp_path, gradient_accumulation_steps=2, max_steps=2, gradient_checkpointing=False)
    caplog.set_level(logging.WARNING, "hf_xsam")
    trainers = []
    for kind, config in ((stock, {}), (ours, {"xsam_config": XSAMConfig(eigen_interval=1)})):
        torch.manual_seed(0)
        trainers.append(kind(model=model, args=args, train_dataset=data, eval_dataset=data, **config))
        trainers[-1].train()
    assert not torch.equal(weights_of(trainers[0].model), weights_of(trainers[1].model))
    (stock_log, *_), (our_log, *_) = map(logs_of, trainers)
    assert our_log["xsam/rayleigh_quotient"] != 0
    # Before the first update the metrics are the stock trainer's.
    first = {name: value for name, value in comparable(stock_log).items() if name != "grad_norm"}
    assert {name: our_log[name] for name in first} == first
    # The second pass at the same weights, which the first step makes, has the same loss and gradient.
    assert "run again at the same weights" not in caplog.text


@pytest.mark.parametrize(
    ("method", "expected"),
    [(KTO, "finite_difference"), (ORPO, "exact"), (CPO, "exact"), (TPO, "exact")],
    ids=["kto", "orpo", "cpo", "tpo"],
)
def test_the_products_are_exact_where_the_head_is_the_models(model, tmp_path, method, expected):
    ours, _, config_class, data = method
    args = settings(config_class, tmp_path, max_steps=1, eval_strategy="no", gradient_checkpointing=False)
    trainer = ours(model=model, args=args, train_dataset=data)
    trainer.train()
    assert trainer._xsam_steps.method == expected


def test_kto_estimates_its_divergence_on_the_same_answers_at_the_perturbed_weights(model, tmp_path):
    seen = []

    class Observed(XSAMKTOTrainer):
        def _compute_kl_logps(self, model, batch):
            logps = super()._compute_kl_logps(model, batch)
            if model is self.model:
                seen.append((batch["KL_input_ids"].clone(), logps))
            return logps

    args = settings(KTOConfig, tmp_path, max_steps=1, eval_strategy="no")
    config = XSAMConfig(rho=0.1, alpha=0.0, replay_check="never")
    Observed(model=model, args=args, train_dataset=UNPAIRED, xsam_config=config).train()
    (answers, there), (same, elsewhere) = seen
    assert torch.equal(answers, same)
    assert not torch.equal(there, elsewhere)

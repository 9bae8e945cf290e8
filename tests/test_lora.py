"""X-SAM restricted to PEFT's adapters."""

import torch
from peft import LoraConfig, get_peft_model

from hf_xsam import XSAMConfig

from .helpers import PLAIN, run, weights_of
from .test_trainer import bert, sentences


def adapted():
    return get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


def test_only_the_adapters_span_the_eigenvector(tmp_path):
    config = XSAMConfig(eigen_scope="lora", alpha=1.0, eigen_interval=1)
    trainer = run(adapted(), sentences(), tmp_path, config)
    names = list(trainer.xsam_state.eigenvector)
    assert names
    assert all("lora_" in name for name in names)
    everything = run(adapted(), sentences(), tmp_path, XSAMConfig(alpha=1.0, eigen_interval=1))
    assert {name for name in everything.xsam_state.eigenvector if "classifier" in name}
    assert not torch.equal(weights_of(everything.model), weights_of(trainer.model))


def test_equals_the_stock_trainer(tmp_path):
    stock = run(adapted(), sentences(), tmp_path)
    ours = run(adapted(), sentences(), tmp_path, XSAMConfig(**PLAIN))
    assert torch.equal(weights_of(ours.model), weights_of(stock.model))

"""X-SAM in TRL's trainers: what equals the stock trainers, and what is refused."""

import logging

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_xsam import XSAMConfig, XSAMTrainer, XSAMTrainerMixin
from hf_xsam.integrations.trl import XSAMDPOTrainer, XSAMRewardTrainer, XSAMSFTTrainer
from tests.helpers import PLAIN, logs_of, save_tiny_language_model, weights_of

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
LORA_REWARD = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
TIMES = ("runtime", "per_second", "epoch", "preparation_time")

TEXT = Dataset.from_dict({"text": ["good film", "a dull plot", "the great film : a fine plot", "bad"] * 3})
COMPLETIONS = Dataset.from_dict(
    {"prompt": ["good film :", "a dull plot :", "the great film :"] * 4, "completion": [" good", " bad", " good"] * 4}
)
PREFERENCES = Dataset.from_dict(
    {
        "prompt": ["the film :", "a plot :", "the dull film :"] * 4,
        "chosen": [" good", " fine plot", " bad"] * 4,
        "rejected": [" bad", " poor", " great film"] * 4,
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_language_model(tmp_path_factory.mktemp("model"))


def settings(config_class, folder, **overrides):
    values = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    values |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False}
    values |= {"eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": True}
    return config_class(**{**values, **overrides})


def comparable(log):
    return {name: value for name, value in log.items() if not name.endswith(TIMES) and "xsam/" not in name}


def assert_equals_stock(model, ours, stock, args, dataset, xsam=None, **given):
    """Train by both, and compare the weights and every metric of every log, bit for bit."""
    trainers = []
    for kind, config in ((stock, {}), (ours, {"xsam_config": xsam or XSAMConfig(**PLAIN)})):
        torch.manual_seed(0)
        loaded = model() if callable(model) else model
        trainer = kind(model=loaded, args=args, train_dataset=dataset, eval_dataset=dataset, **given, **config)
        before = weights_of(trainer.model)
        trainer.train()
        assert not torch.equal(weights_of(trainer.model), before)
        trainers.append(trainer)
    stock_trainer, our_trainer = trainers
    assert torch.equal(weights_of(our_trainer.model), weights_of(stock_trainer.model))
    pairs = zip(our_trainer.state.log_history, stock_trainer.state.log_history, strict=True)
    for our_log, stock_log in pairs:
        assert comparable(our_log) == comparable(stock_log)
    return our_trainer


PEFT = pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
ACCUMULATION = pytest.mark.parametrize("accumulation", [1, 2])


class TestSFT:
    @PEFT
    @ACCUMULATION
    def test_equals_the_stock_trainer(self, model, tmp_path, accumulation, peft_config):
        args = settings(SFTConfig, tmp_path, gradient_accumulation_steps=accumulation)
        trainer = assert_equals_stock(model, XSAMSFTTrainer, SFTTrainer, args, TEXT, peft_config=peft_config)
        assert {"entropy", "mean_token_accuracy", "num_tokens"} <= logs_of(trainer)[0].keys()

    @pytest.mark.parametrize(
        "variant",
        [
            {"packing": True, "max_length": 16},
            {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
            {"padding_free": True, "max_length": None},
            {"loss_type": "dft"},
            {"label_smoothing_factor": 0.1},
            {"gradient_checkpointing": False},
        ],
        ids=["packing", "wrapped", "padding_free", "dft", "label_smoothing", "no_checkpointing"],
    )
    def test_equals_it_in_every_variant(self, model, tmp_path, variant):
        args = settings(SFTConfig, tmp_path, gradient_accumulation_steps=2, **variant)
        assert_equals_stock(model, XSAMSFTTrainer, SFTTrainer, args, TEXT)

    def test_equals_it_on_completions(self, model, tmp_path):
        assert_equals_stock(model, XSAMSFTTrainer, SFTTrainer, settings(SFTConfig, tmp_path), COMPLETIONS)


class TestDPO:
    @PEFT
    @ACCUMULATION
    def test_equals_the_stock_trainer(self, model, tmp_path, accumulation, peft_config):
        args = settings(DPOConfig, tmp_path, gradient_accumulation_steps=accumulation)
        trainer = assert_equals_stock(model, XSAMDPOTrainer, DPOTrainer, args, PREFERENCES, peft_config=peft_config)
        assert {"rewards/margins", "logps/chosen", "num_tokens"} <= logs_of(trainer)[0].keys()

    @PEFT
    def test_equals_it_with_precomputed_log_probabilities(self, model, tmp_path, peft_config):
        args = settings(DPOConfig, tmp_path, gradient_accumulation_steps=2, precompute_ref_log_probs=True)
        assert_equals_stock(model, XSAMDPOTrainer, DPOTrainer, args, PREFERENCES, peft_config=peft_config)

    def test_equals_it_with_an_adapter_trained_before(self, model, tmp_path):
        def adapted():
            return get_peft_model(AutoModelForCausalLM.from_pretrained(model), LORA)

        trainer = assert_equals_stock(adapted, XSAMDPOTrainer, DPOTrainer, settings(DPOConfig, tmp_path), PREFERENCES)
        assert "ref" in trainer.model.peft_config

    def test_equals_it_with_a_synchronized_reference(self, model, tmp_path):
        args = settings(DPOConfig, tmp_path, sync_ref_model=True, ref_model_sync_steps=1)
        assert_equals_stock(model, XSAMDPOTrainer, DPOTrainer, args, PREFERENCES)


class TestReward:
    @ACCUMULATION
    @pytest.mark.parametrize("peft_config", [None, LORA_REWARD], ids=["full", "lora"])
    def test_equals_the_stock_trainer(self, model, tmp_path, accumulation, peft_config):
        args = settings(RewardConfig, tmp_path, gradient_accumulation_steps=accumulation)
        trainer = assert_equals_stock(
            model, XSAMRewardTrainer, RewardTrainer, args, PREFERENCES, peft_config=peft_config
        )
        assert {"accuracy", "margin", "num_tokens"} <= logs_of(trainer)[0].keys()


@pytest.mark.parametrize(
    ("ours", "stock", "config_class", "data", "method"),
    [
        (XSAMSFTTrainer, SFTTrainer, SFTConfig, TEXT, "finite_difference"),
        (XSAMDPOTrainer, DPOTrainer, DPOConfig, PREFERENCES, "finite_difference"),
        (XSAMRewardTrainer, RewardTrainer, RewardConfig, PREFERENCES, "exact"),
    ],
    ids=["sft", "dpo", "reward"],
)
@pytest.mark.parametrize("preset", [XSAMConfig, XSAMConfig.one_pass])
def test_a_corrected_step_counts_once(model, tmp_path, ours, stock, config_class, data, method, preset):
    args = settings(config_class, tmp_path, gradient_accumulation_steps=2, max_steps=2, gradient_checkpointing=False)
    trainers = []
    for kind, config in ((stock, {}), (ours, {"xsam_config": preset(eigen_interval=1, power_iterations=2)})):
        torch.manual_seed(0)
        trainers.append(kind(model=model, args=args, train_dataset=data, eval_dataset=data, **config))
        trainers[-1].train()
    stock_logs, our_logs = logs_of(trainers[0]), logs_of(trainers[1])
    assert trainers[1]._xsam_steps.method == method
    assert our_logs[0]["xsam/rayleigh_quotient"] != 0
    assert not torch.equal(weights_of(trainers[0].model), weights_of(trainers[1].model))
    # Before the first update the metrics are the stock trainer's; the tokens are so throughout.
    first = {name: value for name, value in comparable(stock_logs[0]).items() if name != "grad_norm"}
    assert {name: our_logs[0][name] for name in first} == first
    assert [log["num_tokens"] for log in our_logs] == [log["num_tokens"] for log in stock_logs]


def test_one_pass_without_a_radius_equals_the_stock_trainer(model, tmp_path):
    args = settings(DPOConfig, tmp_path, gradient_accumulation_steps=2)
    assert_equals_stock(model, XSAMDPOTrainer, DPOTrainer, args, PREFERENCES, XSAMConfig.one_pass(0.0))


def test_measuring_the_eigenvalue_leaves_the_metrics_alone(model, tmp_path):
    trainer = XSAMSFTTrainer(model=model, args=settings(SFTConfig, tmp_path), train_dataset=TEXT, eval_dataset=TEXT)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert trainer.top_eigenpair([batch], iterations=2)[1] != 0
    assert not trainer._metrics["eval"]
    assert not trainer._metrics["train"]


def test_offloaded_activations_are_read_once(model, tmp_path):
    args = settings(RewardConfig, tmp_path, gradient_checkpointing=False)
    trainer = XSAMRewardTrainer(model=model, args=args, train_dataset=PREFERENCES, eval_dataset=PREFERENCES)
    args.activation_offloading = True  # only now: TRL itself wants an accelerator for it
    trainer.train()
    assert trainer._xsam_steps.method == "finite_difference"
    assert logs_of(trainer)[0]["xsam/rayleigh_quotient"] != 0


def test_the_finite_difference_agrees_with_double_backward(model, tmp_path, caplog):
    """TRL's fused head against the model's own loss, which has a second derivative."""
    args = settings(SFTConfig, tmp_path, eval_strategy="no")
    trainer = XSAMSFTTrainer(model=model, args=args, train_dataset=TEXT)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    exact = XSAMTrainer(model=trainer.model, args=trainer.args, xsam_config=XSAMConfig(hvp="exact"))
    caplog.set_level(logging.INFO, "hf_xsam")
    ours, theirs = (kind.top_eigenpair([batch], iterations=30)[1] for kind in (trainer, exact))
    said = [record.getMessage() for record in caplog.records if record.name == "hf_xsam.step.double_backward"]
    assert ["hvp='finite_difference'" in message for message in said] == [True, False]
    assert ours == pytest.approx(theirs, rel=0.02)


def test_a_subclass_with_the_mixin_in_front_counts_once(model, tmp_path):
    class Own(SFTTrainer):
        pass

    class OwnXSAM(XSAMTrainerMixin, Own):
        pass

    assert_equals_stock(model, OwnXSAM, Own, settings(SFTConfig, tmp_path), TEXT)


def test_a_method_that_generates_is_refused(model, tmp_path):
    class Online(XSAMTrainerMixin, GRPOTrainer):
        pass

    args = settings(GRPOConfig, tmp_path, num_generations=2, eval_strategy="no")
    with pytest.raises(
        ValueError, match="does not support TRL's GRPOTrainer, only SFTTrainer, DPOTrainer, KTO.*beforehand"
    ):
        Online(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=PREFERENCES.select_columns("prompt"),
        )


def test_a_subclass_of_ours_is_accepted(model, tmp_path):
    class Mine(XSAMSFTTrainer):
        pass

    Mine(model=model, args=settings(SFTConfig, tmp_path), train_dataset=TEXT, eval_dataset=TEXT)


def test_the_card_is_trl_s_and_x_sam_s(model, tmp_path):
    args = settings(
        SFTConfig, tmp_path, save_strategy="steps", save_steps=3, eval_strategy="no", hub_model_id="me/tuned"
    )
    trainer = XSAMSFTTrainer(model=model, args=args, train_dataset=TEXT, xsam_config=XSAMConfig(rho=0.01))
    trainer.train()
    trainer.create_model_card(model_name="tuned", dataset_name="films")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"x-sam", "sft", "trl"} <= set(card.data.tags)
    assert "## Sharpness-aware training" in card.text
    assert "TRL" in card.text
    assert XSAMConfig.from_pretrained(tmp_path / "checkpoint-3") == XSAMConfig(rho=0.01)

"""Pushes with the real client to a hub on this machine: what lands there, what is retried, what is refused."""

import logging
import re
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification, BertTokenizerFast, Trainer, TrainerCallback
from transformers.utils import PushInProgress

from hf_xsam import XSAMConfig, XSAMTrainer
from hf_xsam.saving.hub import PushCallback
from hf_xsam.settings_file import CONFIG_NAME
from tests.cases import tiny_bert
from tests.fake_hub import READ_TOKEN, WRITE_TOKEN, Repository
from tests.helpers import arguments, examples_of, weights_of

REPO = "tester/tiny"
CONFIG = XSAMConfig(rho=0.01, alpha=0.5, correction="aligned", eigen_interval=2, eigen_scope="layer|classifier")
WEIGHTS = {False: "model.safetensors", True: "adapter_model.safetensors"}
ABOUT = {"tasks": "text-classification", "dataset_tags": "tester/sentences", "dataset": "Sentences"}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(folder, adapter=False, **overrides):
    """Return a trainer of a tiny BERT, or of an adapter on it, that pushes to REPO."""
    torch.manual_seed(0)
    model, batch = tiny_bert()
    base, vocabulary = folder / "base", folder / "vocab.txt"
    model.save_pretrained(base)
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    model = BertForSequenceClassification.from_pretrained(base)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": WRITE_TOKEN, "hub_strategy": "end"}
    return XSAMTrainer(
        model=model,
        args=arguments(folder / "output", **{**settings, **overrides}),
        train_dataset=examples_of(batch),
        eval_dataset=examples_of(batch),
        processing_class=BertTokenizerFast(str(vocabulary)),
        compute_metrics=accuracy,
        xsam_config=CONFIG,
    )


class WaitForPush(TrainerCallback):
    """Lets each push end before training goes on, for the stock trainer leaves one out while another is under way."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.push_in_progress.wait_until_done()


def card_of(files):
    return ModelCard(files["README.md"].decode())


def executed(card, heading, folder):
    """Run the code below a heading of the card, with `folder` for the repository, and return its variables."""
    code = re.search(rf"### {heading}\n.*?```python\n(.*?)```", card.text, re.DOTALL).group(1)
    assert REPO in code
    variables = {}
    exec(code.replace(REPO, str(folder)), variables)
    return variables


@pytest.mark.parametrize("adapter", [False, True])
def test_push_at_the_end(hub, tmp_path, adapter):
    trainer = make_trainer(tmp_path, adapter)
    trainer.train()
    measured = trainer.evaluate()
    tested = trainer.evaluate(metric_key_prefix="test")
    trainer.push_to_hub(**ABOUT, finetuned_from="tester/base")

    repository, output = hub.repositories[REPO], tmp_path / "output"
    assert [title for title, _ in repository.commits] == ["End of training"]
    assert {WEIGHTS[adapter], CONFIG_NAME, "README.md", "tokenizer.json"} <= repository.files.keys()
    assert repository.files == {path.name: path.read_bytes() for path in output.iterdir()}

    card = card_of(repository.files)
    assert card.data.tags.count("x-sam") == 1
    assert card.data.base_model == "tester/base"
    assert card.data.datasets == ["tester/sentences"]
    assert card.data.library_name == ("peft" if adapter else "transformers")
    results = {(result.dataset_split, result.metric_type): result for result in card.data.eval_results}
    assert {key: result.metric_value for key, result in results.items()} == {
        (None, "accuracy"): measured["eval_accuracy"],
        (None, "loss"): measured["eval_loss"],
        ("test", "accuracy"): tested["test_accuracy"],
        ("test", "loss"): tested["test_loss"],
    }
    assert {(r.task_type, r.dataset_type) for r in results.values()} == {("text-classification", "tester/sentences")}
    assert f"| test | {tested['test_loss']:.4g} | {tested['test_accuracy']:.4g} |" in card.text
    assert "| `alpha` | `0.5` |" in card.text
    assert r"| `eigen_scope` | `layer\|classifier` |" in card.text
    quotients = [log["xsam/rayleigh_quotient"] for log in trainer.state.log_history if "xsam/rayleigh_quotient" in log]
    assert f"| Rayleigh quotient of the eigenvector | {quotients[0]:.4g} | {quotients[-1]:.4g} |" in card.text
    assert "2601.10251" in card.text
    assert "foret2021" in card.text

    loaded = executed(card, "How to load it", output) if not adapter else executed_on_base(card, tmp_path)
    assert isinstance(loaded["model"], PeftModel if adapter else BertForSequenceClassification)
    if not adapter:
        downloaded = BertForSequenceClassification.from_pretrained(REPO, cache_dir=tmp_path / "cache")
        assert torch.equal(weights_of(downloaded), weights_of(trainer.model))
    trainer.model.eval()
    batch = {"input_ids": torch.arange(12).reshape(1, 12)}
    torch.testing.assert_close(loaded["model"].eval()(**batch).logits, trainer.model(**batch).logits)
    assert loaded["tokenizer"]("good")["input_ids"] == trainer.processing_class("good")["input_ids"]
    assert executed(card, "Settings", output)["xsam_config"] == CONFIG


def executed_on_base(card, folder):
    """As `executed`, with the local base model for the one that the card names."""
    card.text = card.text.replace("tester/base", str(folder / "base"))
    return executed(card, "How to load it", folder / "output")


@pytest.mark.parametrize("adapter", [False, True])
def test_every_save_publishes_all_of_it(hub, tmp_path, adapter):
    saving = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = make_trainer(tmp_path, adapter, hub_strategy="every_save", **saving)
    trainer.add_callback(WaitForPush(trainer))
    trainer.train()

    commits = hub.repositories[REPO].commits
    assert len(commits) == 2
    for steps, (_, files) in zip((2, 4), commits, strict=True):
        assert {WEIGHTS[adapter], CONFIG_NAME, "README.md"} <= files.keys()
        sharpness = [line["xsam/sharpness"] for line in trainer.state.log_history if "loss" in line][:steps]
        assert f"| sharpness, perturbed loss - loss | {sharpness[0]:.4g} | {sharpness[-1]:.4g} |" in card_of(files).text
    card = card_of(commits[-1][1])
    assert "x-sam" in card.data.tags
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert str(tmp_path) not in card.data.to_yaml()  # the base model, a folder here
    assert "\n# tiny\n" in card.text
    assert "### Sharpness during training" in card.text
    assert XSAMConfig.from_pretrained(REPO, cache_dir=tmp_path / "cache") == CONFIG


class Linear(torch.nn.Module):
    """A model without a `config`, for which the stock method cannot write a card."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.linear(x).squeeze(-1), labels)}


def test_a_card_that_cannot_be_written_does_not_end_the_training(hub, tmp_path, caplog):
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": WRITE_TOKEN, "save_strategy": "epoch"}
    trainer = XSAMTrainer(
        model=Linear(),
        args=arguments(tmp_path, num_train_epochs=1, **settings),
        train_dataset=examples_of({"x": torch.randn(8, 3), "labels": torch.randn(8)}),
        xsam_config=XSAMConfig(rho=0.01),
    )
    with caplog.at_level(logging.WARNING, logger="hf_xsam.saving.hub"):
        trainer.train()
    assert "pushed without a model card" in caplog.text
    assert {"model.safetensors", CONFIG_NAME} <= hub.repositories[REPO].files.keys()


def test_a_pushed_checkpoint_has_the_settings(hub, tmp_path):
    trainer = make_trainer(tmp_path, hub_strategy="checkpoint", save_strategy="steps", save_steps=4)
    trainer.train()
    options = {"subfolder": "last-checkpoint", "cache_dir": tmp_path / "cache"}
    assert XSAMConfig.from_pretrained(REPO, **options) == CONFIG
    assert XSAMConfig.from_pretrained(tmp_path / "output", subfolder="checkpoint-4") == CONFIG


@pytest.mark.parametrize("adapter", [False, True])
def test_the_card_is_a_superset_of_the_stock_card(tmp_path, adapter):
    trainer = make_trainer(tmp_path, adapter, push_to_hub=False)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()  # for an adapter, PEFT's part of the card
    path = tmp_path / "output" / "README.md"
    Trainer.create_model_card(trainer, **ABOUT)
    stock = ModelCard.load(path)
    trainer.create_model_card(**ABOUT)
    ours = ModelCard.load(path)

    assert ours.text.startswith(stock.text)
    stock_data, data = stock.data.to_dict(), ours.data.to_dict()
    # PEFT's base model is a folder here.
    assert {*stock_data.pop("tags"), "x-sam"} - {*data.pop("tags")} == (
        {f"base_model:adapter:{tmp_path}/base"} if adapter else set()
    )
    assert stock_data.pop("base_model", None) == (f"{tmp_path}/base" if adapter else None)
    stock_results, results = stock_data.pop("model-index")[0]["results"], data.pop("model-index")[0]["results"]
    assert stock_results[0]["metrics"] == results[0]["metrics"][:1]
    assert data == stock_data


@pytest.mark.parametrize("failure", [("PUT", "^/lfs/", 503), ("POST", "/preupload/", 500), ("POST", "/batch$", 504)])
def test_a_failed_upload_is_retried(hub, tmp_path, failure):
    trainer = make_trainer(tmp_path)
    hub.failures.append(failure)
    trainer.push_to_hub()
    method, pattern, status = failure
    answers = [(path, code) for verb, path, code in hub.requests if verb == method and re.search(pattern, path)]
    failed = next(path for path, code in answers if code == status)
    assert [code for path, code in answers if path == failed] == [status, 200]
    assert "model.safetensors" in hub.repositories[REPO].files


def test_a_token_without_write_access(hub, tmp_path):
    with pytest.raises(HfHubHTTPError, match="may not write to 'tester/tiny'.*write token.*hub_model_id"):
        make_trainer(tmp_path, hub_token=READ_TOKEN)
    with pytest.raises(HfHubHTTPError, match="may not write to 'someone/model'"):
        make_trainer(tmp_path, hub_model_id="someone/model")

    with pytest.raises(HfHubHTTPError, match="may not write to 'tester/tiny'") as error:
        make_trainer(tmp_path, hub_token=READ_TOKEN, push_to_hub=False).push_to_hub()
    assert str(error.value).count("may not write") == 1
    assert "The model is saved" not in str(error.value)  # the stock method creates the repository first

    hub.repositories[REPO] = Repository()
    trainer = make_trainer(tmp_path, hub_token=READ_TOKEN)
    trainer.train()
    with pytest.raises(HfHubHTTPError, match="may not write to 'tester/tiny'") as error:
        trainer.push_to_hub()
    output = tmp_path / "output"
    assert str(error.value).count("may not write") == 1
    assert f"The model is saved in '{output}'" in str(error.value)
    saved = BertForSequenceClassification.from_pretrained(output)
    assert torch.equal(weights_of(saved), weights_of(trainer.model))
    assert XSAMConfig.from_pretrained(output) == CONFIG
    assert not hub.repositories[REPO].commits

    trainer.push_to_hub(token=WRITE_TOKEN)
    assert hub.repositories[REPO].files["model.safetensors"] == (output / "model.safetensors").read_bytes()


def test_a_checkpoint_that_could_not_be_pushed_is_said(hub, tmp_path, caplog):
    hub.repositories[REPO] = Repository()
    trainer = make_trainer(tmp_path, hub_token=READ_TOKEN, hub_strategy="every_save", save_strategy="epoch")
    trainer.add_callback(WaitForPush(trainer))
    with caplog.at_level(logging.ERROR, logger="hf_xsam.saving.hub"):
        trainer.train()
        deadline = time.monotonic() + 10
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # a push is over a moment before its end is logged
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert "A checkpoint was not pushed to 'tester/tiny'" in message
        assert "write token" in message


def test_a_push_that_outlasts_a_save_is_logged_once(caplog):
    job = Future()
    trainer = SimpleNamespace(push_in_progress=PushInProgress([job]), hub_model_id=REPO)
    callback = PushCallback(trainer)
    callback.on_save(None, None, None)
    callback.on_save(None, None, None)
    job.set_exception(ConnectionError("the line is down"))
    assert caplog.messages == [f"A checkpoint was not pushed to {REPO!r}: the line is down"]


def test_settings_from_the_hub(hub, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.push_to_hub()
    first = hub.repositories[REPO].head
    trainer.xsam_config = XSAMConfig()
    trainer.push_to_hub(commit_message="Other settings")
    options = {"cache_dir": tmp_path / "cache"}
    assert XSAMConfig.from_pretrained(REPO, **options) == XSAMConfig()
    assert XSAMConfig.from_pretrained(REPO, revision=first, token=READ_TOKEN, **options) == CONFIG

    del hub.repositories[REPO].files[CONFIG_NAME]
    with pytest.raises(FileNotFoundError, match=f"no {CONFIG_NAME} in '{REPO}' on the hub.*set XSAMConfig's fields"):
        XSAMConfig.from_pretrained(REPO, cache_dir=tmp_path / "other")
    with pytest.raises(OSError, match="'tester/none' is not a local folder.*Repository Not Found.*hf auth login"):
        XSAMConfig.from_pretrained("tester/none", **options)
    with pytest.raises(OSError, match="'tester/tiny' is not a local folder.*Revision Not Found.*revision"):
        XSAMConfig.from_pretrained(REPO, revision="v2", **options)
    with pytest.raises(OSError, match=f"'{tmp_path}/none' is not a local folder"):
        XSAMConfig.from_pretrained(tmp_path / "none")

import json
import re
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_xsam import XSAMConfig


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("rho", -0.1, "at least 0"),
        ("rho", float("nan"), "a finite number"),
        ("rho", "0.1", "a finite number"),
        ("alpha", 2.5, "from 0 to 2"),
        ("alpha", -1.0, "from 0 to 2"),
        ("adaptive", "yes", "True or False"),
        ("normalize_gradient", 1, "True or False"),
        ("correction", "other", "'paper', 'projection', 'aligned'"),
        ("log_metrics", "some", "'summary', 'all'"),
        ("hvp", "double", "'auto', 'exact', 'finite_difference'"),
        ("ascent", "each", "'global', 'local'"),
        ("eigen_interval", 0, "at least 1"),
        ("eigen_interval", 2.0, "an integer"),
        ("eigen_interval", True, "an integer"),
        ("eigen_start_step", -1, "at least 0"),
        ("rho_warmup_steps", -1, "at least 0"),
        ("eigen_warmup_steps", -1, "at least 0"),
        ("power_iterations", 0, "at least 1"),
        ("eigen_batch_fraction", 0.0, "above 0 and at most 1"),
        ("eigen_batch_fraction", 1.5, "above 0 and at most 1"),
        ("eigen_momentum", -0.1, "from 0 to below 1"),
        ("eigen_momentum", 1.0, "from 0 to below 1"),
        ("eigen_scope", "(", "'trainable', 'lora', 'norm' or a regular expression"),
        ("eigen_scope", None, "'trainable', 'lora', 'norm' or a regular expression"),
        ("perturb_scope", "*", "'trainable', 'lora', 'norm' or a regular expression"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"XSAMConfig.{field} is ") as error:
        XSAMConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


def test_defaults_are_the_papers_but_for_rho_and_the_estimate_of_the_eigenvector():
    estimate = {
        "rho": 0.01,
        "eigen_interval": 4,
        "eigen_start_step": 0,
        "eigen_warmup_steps": 80,
        "power_iterations": 1,
        "eigen_batch_fraction": 0.25,
        "eigen_momentum": 0.8,
    }
    assert XSAMConfig().to_dict() == XSAMConfig.paper().to_dict() | estimate


def test_the_papers_settings():
    assert XSAMConfig.paper(rho=0.1, eigen_interval=3) == XSAMConfig(
        rho=0.1,
        eigen_interval=3,
        eigen_start_step=3,
        eigen_warmup_steps=0,
        power_iterations=5,
        eigen_batch_fraction=1.0,
        eigen_momentum=0.0,
    )
    assert XSAMConfig.paper(eigen_start_step=0).eigen_start_step == 0
    assert XSAMConfig.paper().to_dict() == {
        "log_metrics": "summary",
        "perturbation": "gradient",
        "start_step": 0,
        "replay_check": "first",
        "rho": 0.05,
        "adaptive": False,
        "alpha": 0.2,
        "correction": "paper",
        "normalize_gradient": True,
        "eigen_interval": 5,
        "eigen_start_step": 5,
        "eigen_warmup_steps": 0,
        "rho_warmup_steps": 0,
        "power_iterations": 5,
        "eigen_batch_fraction": 1.0,
        "eigen_momentum": 0.0,
        "hvp": "auto",
        "eigen_scope": "trainable",
        "ascent": "global",
        "perturb_scope": "trainable",
    }


def test_parsed_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, XSAMConfig))
    flags = ["--rho", "0.1", "--correction", "aligned", "--normalize_gradient", "false", "--eigen_scope", "lora"]
    args, config = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags])
    assert args.output_dir == str(tmp_path)
    assert config == XSAMConfig(rho=0.1, correction="aligned", normalize_gradient=False, eigen_scope="lora")
    assert all(spec.metadata["help"] for spec in fields(XSAMConfig))


def test_dictionary_round_trip():
    config = XSAMConfig(rho=1, alpha=1.5, hvp="exact", eigen_scope=r"layer\.1")
    assert XSAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert XSAMConfig.from_dict({"rho": 0.2}) == XSAMConfig(rho=0.2)
    with pytest.raises(ValueError, match="no field sigma.*rho"):
        XSAMConfig.from_dict({"sigma": 1})


def test_saved_beside_a_model_and_read_back(tmp_path):
    config = XSAMConfig(rho=0.02, alpha=1.5, correction="aligned", normalize_gradient=False, eigen_scope=r"layer\.1")
    config.save_pretrained(tmp_path / "new" / "model")
    assert XSAMConfig.from_pretrained(tmp_path / "new" / "model") == config
    assert XSAMConfig.from_pretrained(str(tmp_path / "new"), subfolder="model") == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"does not exist\. XSAMTrainer writes it beside each model"),
        (b"{", r"is damaged \(Expecting.*\)\. Write it again with XSAMConfig\.save_pretrained.*force_download=True"),
        (b"\xff", "is damaged"),
        (b"[]", "is damaged .it holds a list, not an object"),
        (b'{"sigma": 1}', "XSAMConfig has no field sigma; .* If a newer hf_xsam wrote the file, update"),
        (b'{"rho": -1}', "XSAMConfig.rho is -1; it must be at least 0. .* otherwise correct the file"),
    ],
)
def test_a_file_that_is_missing_or_wrong_is_named(tmp_path, content, message):
    path = tmp_path / "xsam_config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        FileNotFoundError if content is None else ValueError, match=re.escape(str(path)) + ".*" + message
    ):
        XSAMConfig.from_pretrained(tmp_path)


def test_offline_without_a_cached_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="'user/model' is not in the local cache.*HF_HUB_OFFLINE"):
        XSAMConfig.from_pretrained("user/model", cache_dir=tmp_path)


def test_schedules():
    config = XSAMConfig(rho=0.4, rho_warmup_steps=4, eigen_start_step=3, eigen_interval=2, eigen_warmup_steps=0)
    assert [config.rho_at(step) for step in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert [step for step in range(6) if config.refreshes_at(step, None)] == [3, 4, 5]
    assert [step for step in range(10) if config.refreshes_at(step, 5)] == [3, 4, 5, 7, 8, 9]
    warming = XSAMConfig(eigen_start_step=1, eigen_interval=4, eigen_warmup_steps=6)
    assert [warming.eigen_interval_at(step) for step in range(1, 9)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [step for step in range(1, 9) if warming.refreshes_at(step, 3)] == [1, 2, 3, 6, 7, 8]
    assert XSAMConfig(rho=0.4).rho_at(0) == 0.4
    assert not XSAMConfig(alpha=0.0).refreshes_at(0, None)

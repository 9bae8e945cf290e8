import json
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
        ("hvp", "double", "'auto', 'exact', 'finite_difference'"),
        ("ascent", "each", "'global', 'local'"),
        ("eigen_interval", 0, "at least 1"),
        ("eigen_interval", 2.0, "an integer"),
        ("eigen_interval", True, "an integer"),
        ("eigen_start_step", -1, "at least 0"),
        ("rho_warmup_steps", -1, "at least 0"),
        ("power_iterations", 0, "at least 1"),
        ("eigen_scope", "(", "'trainable' or 'lora' or a regular expression"),
        ("eigen_scope", None, "'trainable' or 'lora' or a regular expression"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"XSAMConfig.{field} is ") as error:
        XSAMConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


def test_defaults_are_the_papers():
    assert XSAMConfig().to_dict() == {
        "rho": 0.05,
        "adaptive": False,
        "alpha": 0.2,
        "correction": "paper",
        "normalize_gradient": True,
        "eigen_interval": 5,
        "eigen_start_step": 0,
        "rho_warmup_steps": 0,
        "power_iterations": 5,
        "hvp": "auto",
        "eigen_scope": "trainable",
        "ascent": "global",
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


def test_schedules():
    config = XSAMConfig(rho=0.4, rho_warmup_steps=4, eigen_start_step=3, eigen_interval=2)
    assert [config.rho_at(step) for step in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert [step for step in range(6) if config.refreshes_at(step, None)] == [3, 4, 5]
    assert [step for step in range(10) if config.refreshes_at(step, 5)] == [3, 4, 7, 8, 9]
    assert XSAMConfig(rho=0.4).rho_at(0) == 0.4
    assert not XSAMConfig(alpha=0.0).refreshes_at(0, None)

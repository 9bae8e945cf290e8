"""The echo check: one warning names what a step changes that cannot be put back."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer

from hf_xsam import XSAMConfig, XSAMTrainerMixin
from tests.helpers import run
from tests.models import Smooth, points


def with_xsam(kind):
    return type(kind.__name__, (XSAMTrainerMixin, kind), {})


class TestEcho:
    """What is put back makes no warning (`test_same_step`); what is not is named, once."""

    @pytest.mark.parametrize("build", [lambda: OfItsClass(), lambda: Global(), lambda: Iterating()])
    @pytest.mark.parametrize("check", ["first", "every"])
    def test_names_what_moved(self, build, check, tmp_path, caplog):
        model = build()
        run(model, points(), tmp_path, XSAMConfig(rho=0.1, replay_check=check))
        (said,) = [message for message in caplog.messages if "run again at the same weights" in message]
        assert f"Between the passes has changed: {model.moves}. X-SAM" in said

    def test_names_nothing_where_nothing_can_be_seen(self, tmp_path, caplog):
        numbers = iter(range(1000))

        class Secret(Trainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                return super().compute_loss(model, inputs, *args, **kwargs) * (1 + next(numbers))

        run(Smooth(), points(), tmp_path, XSAMConfig(rho=0.1), with_xsam(Secret))
        assert "nothing that the model or the trainer holds" in caplog.text

    @pytest.mark.parametrize(("check", "passes"), [("first", 2 * 8 + 1), ("every", 3 * 8), ("never", 2 * 8)])
    def test_costs_one_pass(self, check, passes, tmp_path):
        seen, model = [], Smooth()
        model.register_forward_hook(lambda *_: seen.append(1))
        run(model, points(), tmp_path, XSAMConfig(rho=0.1, alpha=0.0, replay_check=check))
        assert len(seen) == passes


@pytest.mark.parametrize("ascent", ["global", "local"])
def test_processes_agree_though_only_one_of_them_has_changed(ascent):
    """The first one, which warns, has no such change of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).parent / "echo_run.py"
    result = subprocess.run([*launcher, str(script), ascent], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stderr.count("run again at the same weights") == 1
    assert "Between the passes has changed: COUNT (used in Counting.forward). X-SAM" in result.stderr


class OfItsClass(Smooth):
    moves, count = "model.count", 0

    def forward(self, x, labels):
        type(self).count += 1
        return super().forward(x * (1 + 0.1 * self.count), labels)


COUNT = 0


class Global(Smooth):
    moves = "COUNT (used in Global.forward)"

    def forward(self, x, labels):
        global COUNT
        COUNT += 1
        return super().forward(x * (1 + 0.1 * COUNT), labels)


class Iterating(Smooth):
    moves = "model.numbers"

    def __init__(self):
        super().__init__()
        self.numbers = (number for number in range(1000))

    def forward(self, x, labels):
        return super().forward(x * (1 + 0.1 * next(self.numbers)), labels)

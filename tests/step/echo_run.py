"""Run by test_echo.py in each of two processes: trains a model that moves a global variable in the second one alone."""

import sys
import tempfile
from pathlib import Path

from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from hf_xsam import XSAMConfig, XSAMTrainer
from tests.helpers import arguments, end_together, examples_of
from tests.models import Smooth, points

COUNT = 0


class Counting(Smooth):
    def forward(self, x, labels):
        global COUNT
        COUNT += PartialState().process_index
        return super().forward(x * (1 + 0.1 * COUNT), labels)


config = XSAMConfig(rho=0.1, ascent=sys.argv[1], replay_check="every")
settings = arguments(tempfile.mkdtemp(), max_steps=2)
XSAMTrainer(Counting(), settings, train_dataset=examples_of(points()), xsam_config=config).train()
end_together()

"""Run by test_accelerate.py in each process: a recipe, sharded on the CPU where the configuration says FSDP."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from tests.helpers import shard_on_cpu  # noqa: E402

shard_on_cpu()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

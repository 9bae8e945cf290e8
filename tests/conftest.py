import gc
import os

import pytest

from tests.fake_hub import FakeHub

# Before torch and transformers are imported, which read these once. No test may reach the hub itself, and models are
# small enough for one thread each, in every process that a test starts: equal bit for bit takes as many threads.
fake_hub = FakeHub()
os.environ["HF_ENDPOINT"] = fake_hub.endpoint
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_finish():
    # Each training ends in gc.collect, which takes longer than a tiny training if it looks at all that was imported.
    gc.freeze()


@pytest.fixture
def nothing_downloaded(tmp_path, monkeypatch):
    """No package in the cache, and no index to fetch one from."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


@pytest.fixture
def hub(monkeypatch):
    """An empty hub on this machine, online for this test."""
    from huggingface_hub import constants

    fake_hub.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return fake_hub

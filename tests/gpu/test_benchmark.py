"""The benchmark of a GPU's step, on a tiny model."""

import gc

from contenders import trainers
from gpu_cost import measure
from gpu_workloads import repeated

from tests.models import bert, sentences


def test_figures():
    gc.collect()  # what is left of other tests is to be in no figure
    results = measure(repeated(bert, sentences()), steps=20, repeats=2)
    assert list(results) == list(trainers(rho=0.01))
    assert all(len(result["seconds"]) == 2 and min(result["seconds"]) > 0 for result in results.values())
    assert results["X-SAM"]["product"] == "exact"
    stock, sam = results["stock Trainer"], results["SAM"]
    assert sam["peak_bytes"] > stock["peak_bytes"] > 4 * 4 * stock["trainable"]

"""How far a measurement has come: what it reports, and a bar that shows it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from tqdm import tqdm

from ..functional.hessian_vector_products import HessianVectorProduct
from ..functional.spectrum import SPARE_VECTORS
from .settings import MeasureSettings

# Called as report(part, done, total): what is being measured, and on how many batches of how many, each batch counted
# again for every loss, gradient and Hessian-vector product.
Report = Callable[[str, int, int], None]


class Progress:
    """Counts the batches of a measurement's losses, gradients and Hessian-vector products.

    Lanczos takes the products that it needs: until it is done, the total has those that it takes at least, and grows
    where it takes more.

    Args:
        report: told of each batch.
        settings: what is measured.
        batches: how many there are.
    """

    def __init__(self, report: Report, settings: MeasureSettings, batches: int) -> None:
        self._report, self._batches, self._part = report, batches, "gradient"
        self._done, self._limit = 0, math.inf
        self._left = settings.trace_samples + len(settings.rhos) + 2 * settings.slice_points  # after Lanczos
        residuals = settings.top_k
        self._total = 2 + 2 * settings.top_k + SPARE_VECTORS + residuals + self._left

    def begin(self, part: str) -> None:
        """Begin a part of the measurement: "eigenvalues" and "trace" are of products, all others of losses."""
        # What it takes to choose a kind of product is not counted.
        self._part, self._limit = part, self._done if part in ("eigenvalues", "trace") else math.inf
        if part == "trace":
            self._total = self._done // self._batches + self._left
        self._tell()

    def batch_done(self) -> None:
        """Count a batch."""
        if self._done < self._limit:
            self._done += 1
            self._tell()

    def counted(self, product: HessianVectorProduct) -> HessianVectorProduct:
        """Return v -> H v that counts as one pass over the batches, whether or not it computes their losses again."""

        def counting(vector: Sequence[Tensor]) -> list[Tensor]:
            self._limit = self._done + self._batches
            if self._part == "eigenvalues":
                self._total = max(self._total, self._limit // self._batches + self._left)
            result = product(vector)
            self._done = self._limit
            self._tell()
            return result

        return counting

    def _tell(self) -> None:
        self._report(self._part, self._done, self._total * self._batches)


@contextmanager
def bar(shown: bool) -> Iterator[Report]:
    """Yield what shows a bar of all batches on the terminal, if `shown` and there is one."""
    # Not before the total is known.
    with tqdm(desc="sharpness", unit=" batches", disable=None if shown else True, leave=False, delay=0.1) as line:

        def report(part: str, done: int, total: int) -> None:
            line.total = total
            line.set_description_str(part, refresh=False)
            line.update(done - line.n)

        yield report

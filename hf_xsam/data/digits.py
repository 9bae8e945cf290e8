"""scikit-learn's handwritten digits, the embedded image data set."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from sklearn.datasets import load_digits

from .splits import SPLIT_SEED


def digits() -> DatasetDict:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, split into train and test."""
    data = load_digits()
    columns = {"image": list((data.images * (255 / 16)).astype(np.uint8)), "label": data.target}
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_dict(columns, features).train_test_split(test_size=0.2, seed=SPLIT_SEED)

"""The language models that scaling.py trains, and their batches."""

from cost_formulas import Llama

MICRO_BATCH, LENGTH, VOCABULARY = 4, 32, 1024
SIZES = {
    name: Llama(width, layers, inner, VOCABULARY)
    for name, width, layers, inner in (
        ("0.1M", 64, 2, 128),
        ("1M", 128, 4, 384),
        ("4M", 256, 4, 768),
        ("16M", 512, 4, 1536),
        ("60M", 1024, 4, 3072),
        ("135M", 1024, 10, 3072),
    )
}

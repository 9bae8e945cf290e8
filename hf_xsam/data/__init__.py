"""Data for the recipes and the command line: embedded data sets, splits, and the encoding of examples.

Its modules need `pip install 'hf_xsam[tools]'`.
"""

IGNORED = -100  # the label of tokens that transformers' losses leave out
TARGETS = "labels"  # the column of what a model is trained on

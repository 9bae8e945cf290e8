"""Data for the recipes and the command line: the embedded data sets, splits, and how examples become a model's inputs.

Its modules need `pip install 'hf_xsam[tools]'`.
"""

IGNORED = -100  # the label of tokens that transformers' losses leave out

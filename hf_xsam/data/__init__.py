"""Data for the recipes and the command line: the embedded data sets, splits, and how examples become a model's inputs.

It needs `pip install 'hf_xsam[tools]'`.
"""

"""Data for the recipes and the command line: embedded data sets, splits, and the encoding of examples.

Needs `pip install 'hf_xsam[tools]'`.
"""

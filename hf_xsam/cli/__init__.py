"""The command line, `hf-xsam`: one module a command."""

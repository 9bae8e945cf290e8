"""The package's layout: what is imported from where."""

from importlib import import_module

import pytest

import hf_xsam


@pytest.mark.parametrize("name", hf_xsam.__all__)
def test_what_users_import(name):
    found = getattr(import_module("hf_xsam"), name)
    assert found.__name__ == name
    assert name in dir(hf_xsam)


def test_what_the_package_lacks_is_named():
    with pytest.raises(ImportError, match="cannot import name 'XSAMConfg' from 'hf_xsam'"):
        from hf_xsam import XSAMConfg  # noqa: F401

"""What pyproject.toml cannot say: `pip install .` builds the native routine if it can."""

from setuptools import setup

try:
    import cffi  # noqa: F401 - without it, cffi_modules is an unknown keyword

    native = {"cffi_modules": ["build_native.py:ffibuilder"]}
except ImportError:
    native = {}
setup(**native)

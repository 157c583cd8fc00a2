"""The package's version, in one place for pip, `megatrain --version` and saved files."""

__version__ = "0.1.0"

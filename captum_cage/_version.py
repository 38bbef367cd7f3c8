"""The version, for the package, its metadata and the files it writes."""

__all__ = ["__version__"]

__version__ = "0.1.0"

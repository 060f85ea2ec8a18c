"""The version of tva, defined only here."""

__version__ = "0.1.0"

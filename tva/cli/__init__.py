"""The command line ``tva``."""

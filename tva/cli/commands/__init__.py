"""The commands of ``tva``, one file each."""

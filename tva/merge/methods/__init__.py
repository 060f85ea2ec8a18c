"""The merge methods, one file each."""

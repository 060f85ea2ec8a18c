"""The checkpoint formats that can be read, one file each."""

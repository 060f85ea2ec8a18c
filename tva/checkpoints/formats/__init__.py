"""The checkpoint formats that can be read, one module each; a new one is a new file here, or an entry point.

A module of this folder, or one that an installed package names in the entry-point group ``tva.checkpoint_formats``,
has two functions:

- ``matches(path: Path) -> bool`` returns whether a file or folder is of this format. It goes by content, never by the
  ending of a name, reads as little as it can, and claims nothing that another format claims.
- ``open(path: Path, which: Which) -> LazyWeights`` opens it, reads no tensor yet, and executes nothing. ``which``
  counts only where a file holds two sets of weights. Whatever is wrong is a ValueError that names the file.

It may have ``ENDINGS``, endings of file names: where the content of a file matches no format, as of one that is cut
off, the format with its ending is the one that says what is wrong.
"""

"""The commands of ``tva``, one file each: ``fit_many.py`` is ``fit-many``, ``vectors__ls.py`` is ``vectors ls``.

A file holds what a command is:

- ``HELP``: one line, a literal string; ``tva --help`` reads it without importing the file.
- ``run``: a function; its parameters and docstring are the command's options and their help.
- ``show(result)``: prints what ``run`` returned; with ``--json`` it is printed as JSON instead.

and where it needs them:

- ``ORDER``: the options that need no name, such as ``"checkpoint vectors…"``; the ellipsis takes all the rest.
- ``to_json(result)``: the plain values for ``--json``; by default the result's own ``to_json()``, or its fields.
- ``finish(result)``: called after the result is printed in either form; False ends the process with status 1.
- ``read_words(words)``: rewrites the command line before it is parsed.

``show`` and ``finish`` may have more parameters: those of ``run`` by the same names, or options of their own. A command
that parses its arguments itself has ``start(words, as_json)`` instead, which returns False to end with status 1. A
command of another package is such a module under the entry-point group ``tva.commands``.
"""

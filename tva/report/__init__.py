"""The numbers of ``edit.json`` as a page, a model card, a terminal table and a notebook cell."""

"""The paper's experiments as data: what each needs, its fits and edits, the paper's numbers, and ours beside them."""

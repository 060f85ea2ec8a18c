"""The paper's experiments as data: requirements, fits and edits, and the paper's numbers beside ours."""

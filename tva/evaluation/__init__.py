"""Evaluate a model on a task, with every example's score and intervals."""

"""Choose the coefficients, edit the model, and prove the edit on control tasks."""

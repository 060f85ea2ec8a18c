"""A finished edit on a local page, where sliders set its coefficients."""

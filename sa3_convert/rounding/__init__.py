"""Where weights are rounded to: the converter's grid, better scales on it, and what rounding costs."""

"""From a size or a fidelity to a recipe."""

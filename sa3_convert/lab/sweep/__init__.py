"""Many recipes of one checkpoint: converted, measured, and what is worth keeping of them."""

"""Generation from a bundle."""

"""Bundles: manifest, reading a folder, size tables."""

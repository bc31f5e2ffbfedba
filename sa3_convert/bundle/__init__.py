"""Bundles: manifest, layout on disk, published trees."""

"""Whole generations on both sides, taken apart: what a full verification is made of."""

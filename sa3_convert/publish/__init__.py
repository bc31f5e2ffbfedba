"""Bundles handed on: the names and folders that clients read, and what an app has to know."""

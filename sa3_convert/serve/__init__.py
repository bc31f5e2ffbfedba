"""A page and an HTTP interface over generation, from one process and a worker that holds the models."""

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Names under which a machine reaches itself alone."""

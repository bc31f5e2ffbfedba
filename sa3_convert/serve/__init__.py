"""A page and an HTTP interface over generation, from one process and a worker that holds the models."""

"""A verification as a folder: a page to read, data to compute with, a summary for a pull request."""

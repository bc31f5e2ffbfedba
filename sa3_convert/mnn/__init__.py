"""MNN: convert, read what a file holds, run it."""

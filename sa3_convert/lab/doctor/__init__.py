"""What the installed MNN gets right on this machine: measured with small models, kept, and asked by other commands."""

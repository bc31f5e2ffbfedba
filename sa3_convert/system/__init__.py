"""What the operating system is asked for: machine, files, processes, outputs. The only place that asks."""

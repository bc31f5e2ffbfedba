"""The laboratory: tools that measure, explain and report. Nothing that converts or runs imports it."""

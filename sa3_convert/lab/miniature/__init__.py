"""A very small model of the published format: its sounds, captions, training, and how they are recognised.

It makes simple sounds on demand, so that what a conversion loses can be told by what is recognised in generations.
"""

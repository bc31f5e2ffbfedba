"""How long work tells what it is doing."""

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is of it)"""

"""What becomes of processes that a test has started."""

import os
import time


def ended(group: int) -> bool:
    """Tell whether all processes of a group are gone; the last of them may take a moment."""
    waited = time.monotonic() + 20
    while time.monotonic() < waited:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False

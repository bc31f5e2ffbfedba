"""MNN's bindings count references wrongly; the process has to survive it."""

import sys

from sa3_convert.mnn.session import has_backend


def test_asking_for_a_backend_again_costs_no_reference_to_true() -> None:
    assert has_backend("cpu")
    before = sys.getrefcount(True)
    for _ in range(50):
        has_backend("cpu")
    assert sys.getrefcount(True) > before - 25

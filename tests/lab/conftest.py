"""The small bundle that the checks of models use serves the laboratory too."""

from tests.check.conftest import bundle, copy_of, two_models

__all__ = ["bundle", "copy_of", "two_models"]

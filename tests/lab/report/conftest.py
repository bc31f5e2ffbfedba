"""A verification of a toy bundle, done once."""

from dataclasses import dataclass

import pytest

from sa3_convert.arrays import Floats
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.lab.bisect.walk import BisectResult
from sa3_convert.lab.generations.full import Verification, verify_fully
from sa3_convert.lab.generations.trajectory import GenerationCase, all_cases
from sa3_convert.lab.report.build import bisected_models

# The toy bundles' own, which the fixture of the same name one folder up hides.
from tests.bundles import converted as converted

CASES = all_cases((0, 1), (0,), (1.0,))


@dataclass(frozen=True)
class Verified:
    """What `verify --full --report` has in hand when it writes."""

    bundle: Bundle
    findings: Verification
    layers: dict[Component, BisectResult]
    heard: dict[str, dict[str, Floats]]


@pytest.fixture(scope="session")
def verified(toy_int8: Bundle) -> Verified:
    heard: dict[str, dict[str, Floats]] = {}

    def hear(case: GenerationCase, side: str, audio: Floats) -> None:
        heard.setdefault(case.name, {})[side] = audio

    findings = verify_fully(toy_int8, cases=CASES, steps=3, quick=True, threads=2, heard=hear)
    return Verified(toy_int8, findings, bisected_models(toy_int8, findings, threads=2), heard)

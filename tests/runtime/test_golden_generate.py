"""Whole generations against the reference implementation's, on each engine."""

from typing import Any

import numpy as np
import pytest

from sa3_convert.runtime.pipeline import Pipeline
from tests.conftest import assert_close_to_peak, load_golden
from tests.runtime.conftest import golden_request, open_parts

FAMILIES = ["small", "base", "medium"]
CASES = [
    pytest.param(family, case, id=f"{family}-{case['latents'].removeprefix('generate.').removesuffix('.latents')}")
    for family in FAMILIES
    for case in load_golden(family).of("generate")
]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_torch_gives_the_reference_latents_and_audio(family: str, case: dict[str, Any]) -> None:
    golden = load_golden(family)
    parts = open_parts(family, padding=case["padding"])
    pipeline = Pipeline(parts.layout, parts.engine, parts.prompts, parts.bottleneck)
    result = pipeline.generate(golden_request(golden, case))
    valid = result.report.lengths.valid
    assert_close_to_peak(result.report.latents[..., :valid], golden.tensors[case["latents"]][..., :valid], 2e-5)
    assert_close_to_peak(result.audio[np.newaxis], golden.tensors[case["audio"]], 2e-5)

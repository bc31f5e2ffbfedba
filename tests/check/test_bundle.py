"""A bundle is verified against its own references, recipe and manifest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.bundle.manifest import RECIPE, FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.check.results import Verdict
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, VerificationError
from tests.check.conftest import COMPONENTS, make_recipe


def rewrite(folder: Path, component: Component | None, kind: str, **changes: Any) -> Bundle:
    """Change what the manifest says of one artifact."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for artifact in data["artifacts"]:
        if artifact["component"] == component and artifact["kind"] == kind:
            artifact.update(changes)
    path.write_text(json.dumps(data))
    return Bundle.open(folder)


def with_floor(folder: Path, floor_db: float) -> Bundle:
    """Give the bundle another floor, consistently: recipe, its hash, and the manifest's copy."""
    (folder / RECIPE).write_text(make_recipe(floor_db).to_yaml())
    rewrite(folder, None, "recipe", **dict(FileEntry.of(folder, RECIPE)))
    for component in COMPONENTS:
        rewrite(folder, component, "mnn", floor_db=floor_db)
    return Bundle.open(folder)


def test_a_bundle_as_converted_passes_and_reports_each_component(bundle: Bundle) -> None:
    seen: list[Verdict] = []
    result = verify_bundle(bundle, quick=True, threads=2, report=seen.append)
    result.check()
    assert [v.component for v in result.verdicts] == list(COMPONENTS)
    assert seen == list(result.verdicts)
    assert all(30 < v.worst.signal_to_noise_db < 60 for v in result.verdicts)


def test_the_figures_of_the_conversion_are_reproduced(bundle: Bundle) -> None:
    for verdict in verify_bundle(bundle, quick=True, threads=2).verdicts:
        assert verdict.claimed_db is not None
        assert verdict.measured_db == pytest.approx(verdict.claimed_db, abs=0.05)


def test_the_full_set_contains_the_quick_one(bundle: Bundle) -> None:
    part = (Component.NUMBER_CONDITIONER,)
    quick = verify_bundle(bundle, components=part, quick=True, threads=2).verdicts[0]
    full = verify_bundle(bundle, components=part, threads=2).verdicts[0]
    assert set(quick.measurements) < set(full.measurements)
    assert quick.measured_db == full.measured_db


def test_only_the_components_that_were_asked_for_are_verified(bundle: Bundle) -> None:
    result = verify_bundle(bundle, components=(Component.DIT,), quick=True, threads=2)
    assert [v.component for v in result.verdicts] == [Component.DIT]


def test_below_the_recipes_floor_is_a_failure_that_names_a_floor_that_passes(copy_of: Callable[[], Path]) -> None:
    result = verify_bundle(with_floor(copy_of(), 43), quick=True, threads=2)
    assert not result.passed
    with pytest.raises(VerificationError, match=r"number_conditioner: .*floor is 43 dB.*floor_db: 4\d\.\d"):
        result.check()


def test_a_component_that_the_bundle_lacks_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="decoder"):
        verify_bundle(bundle, components=(Component.DECODER,), quick=True)


def test_a_reference_that_is_gone_cannot_be_verified_against(copy_of: Callable[[], Path]) -> None:
    bundle = rewrite(copy_of(), Component.DIT, "onnx", kept_at="../nowhere")
    with pytest.raises(BundleError, match="is missing where the bundle's conversion kept it"):
        verify_bundle(bundle, quick=True)


def test_a_claim_that_the_file_does_not_keep_is_a_failure(copy_of: Callable[[], Path]) -> None:
    figures = {"signal_to_noise_db": 55.0, "cosine": 1.0, "max_abs_error": 0.0}
    bundle = rewrite(copy_of(), Component.DIT, "mnn", fidelity=figures)
    with pytest.raises(VerificationError, match=r"dit: the manifest claims 55\.00 dB"):
        verify_bundle(bundle, quick=True, threads=2).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "manifest calls it fp16, its recipe makes int8"),
        ({"floor_db": 10.0}, "manifest's floor is 10 dB, its recipe's 30 dB"),
        ({"storage": {"bytes": 1, "types": {}}}, "otherwise than the manifest says"),
    ],
)
def test_a_manifest_that_contradicts_recipe_or_file_is_refused(
    copy_of: Callable[[], Path], changes: dict[str, Any], message: str
) -> None:
    bundle = rewrite(copy_of(), Component.DIT, "mnn", **changes)
    with pytest.raises(VerificationError, match=message):
        verify_bundle(bundle, quick=True)


def test_a_recipe_of_another_name_is_refused(copy_of: Callable[[], Path]) -> None:
    folder = copy_of()
    recipe = make_recipe().model_copy(update={"name": "fp16"})
    (folder / RECIPE).write_text(recipe.to_yaml())
    bundle = rewrite(folder, None, "recipe", **dict(FileEntry.of(folder, RECIPE)))
    with pytest.raises(VerificationError, match="'int8', and holds recipe 'fp16'"):
        verify_bundle(bundle, quick=True)

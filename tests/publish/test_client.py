"""The published client's own choice of names is replayed over whatever can be exported for it."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sa3_convert.bundle.manifest import FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BundleError, UsageError
from sa3_convert.publish.export import export_bundles
from sa3_convert.recipe import load_recipe
from tests.bundle.test_manifest import make_bundle
from tests.bundles import CONFIGS

RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
VARIANTS = {"small-music": "sm-music", "small-sfx": "sm-sfx", "medium": "medium"}
FLAGS = [tuple(flags) for n in range(3) for flags in itertools.combinations(("--mnn-int8", "--mnn-t5-fp32"), n)]


def client_loads(folder: Path, variant: str, flags: Sequence[str]) -> dict[str, Path] | None:
    """Return what the client opens by its own rules; None if something is missing without which it does not start."""
    key, int8 = variant.replace("sm-", ""), "--mnn-int8" in flags
    tier = "int8" if int8 else "fp16"
    dits = [f"dit_{key}_int8.mnn"] if int8 else [f"dit_{key}_fp16_f32io.mnn", f"dit_{key}_fp16_v2_f32io.mnn"]
    opened = {
        "text_encoder": folder / ("text_encoder.mnn" if "--mnn-t5-fp32" in flags else "text_encoder_int4.mnn"),
        "number_conditioner": folder / f"number_conditioner_{key}_{tier}.mnn",
        "dit": next((folder / name for name in dits if (folder / name).exists()), folder / dits[-1]),
        "decoder": folder / "decoder_fused_wn.mnn",
        "tokenizer": folder / "tokenizer.json",
    }
    if not all(path.is_file() for path in opened.values()):
        return None
    encoder = folder / ("encoder_int8.mnn" if int8 else "encoder.mnn")
    with_encoder = encoder.exists() and (folder / "bottleneck_params.json").exists()
    return opened | ({"encoder": encoder} if with_encoder else {})


def bundle_of(folder: Path, variant: str, name: str) -> Bundle:
    """A bundle whose models say that they are stored as a recipe asks."""
    recipe, plain = load_recipe(CONFIGS / f"{name}.yaml"), make_bundle(folder, variant)
    artifacts = []
    for artifact in plain.manifest.artifacts:
        if artifact.component is not None:
            (folder / artifact.path).write_text(f"{artifact.component} {variant} {name}")
        precision = artifact.component and recipe.for_component(artifact.component).precision
        changes = dict(FileEntry.of(folder, artifact.path)) | {"precision": precision}
        artifacts.append(artifact.model_copy(update=changes))
    changed = plain.manifest.model_copy(update={"recipe": name, "artifacts": tuple(artifacts)})
    return Bundle(folder, changed)


def said_in(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return variant and flags as the folder's README says them."""
    line = re.search(r"sa3-cli --mnn(.*) --variant (\S+) ", (folder / "README.md").read_text())
    assert line is not None
    return line[2], tuple(line[1].split())


def check_loads(folder: Path, given: Bundle) -> None:
    variant, flags = said_in(folder)
    assert variant == VARIANTS[given.manifest.variant]
    # Under other flags it misses a file and says which; never does it open what is meant for something else.
    assert [other for other in FLAGS if client_loads(folder, variant, other) is not None] == [flags]
    opened = client_loads(folder, variant, flags)
    assert opened is not None
    for component in Component:
        assert opened[component].read_bytes() == given.file(component).read_bytes()
    Bundle.open(folder).check()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_under_the_flags_that_its_readme_says(tmp_path: Path, variant: str, recipe: str) -> None:
    bundle = bundle_of(tmp_path / "b", variant, recipe)
    export_bundles([bundle], tmp_path / "out", "flat")
    (folder,) = (tmp_path / "out").iterdir()
    check_loads(folder, bundle)


def test_bundles_of_all_variants_and_recipes_load_beside_one_another(tmp_path: Path) -> None:
    bundles = [bundle_of(tmp_path / f"{v}-{r}", v, r) for v in VARIANTS for r in RECIPES]
    export_bundles(bundles, tmp_path / "out", "flat")
    found = {folder.name: folder for folder in (tmp_path / "out").iterdir()}
    assert len(found) == len(bundles)
    for bundle in bundles:
        family = bundle.manifest.variant.removeprefix("small-")
        check_loads(found[f"{family}-{bundle.manifest.recipe}"], bundle)


def test_the_default_text_encoder_needs_no_flag(tmp_path: Path) -> None:
    export_bundles([make_bundle(tmp_path / "b")], tmp_path / "out", "flat")
    assert said_in(tmp_path / "out" / "music") == ("sm-music", ("--mnn-int8",))


@pytest.mark.parametrize("variant", ["small-music-base", "medium-base"])
def test_base_models_are_refused_with_the_reason(tmp_path: Path, variant: str) -> None:
    bundle = make_bundle(tmp_path / "b", variant)
    layout = replace(bundle.layout, objective="rectified_flow")
    changed = bundle.manifest.model_copy(update={"layout": layout})
    with pytest.raises(BundleError, match="samples post-trained models alone"):
        export_bundles([Bundle(bundle.path, changed)], tmp_path / "out", "flat")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["text_encoder", "number_conditioner", "dit", "decoder", "tokenizer"])
def test_what_the_client_cannot_start_with_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    bundle = make_bundle(tmp_path / "b")
    left = tuple(a for a in bundle.manifest.artifacts if missing not in (a.component, a.kind))
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"artifacts": left}))
    with pytest.raises(BundleError, match=f"has no {missing}, without which"):
        export_bundles([changed], tmp_path / "out", "flat")


def test_one_bundle_twice_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="would be music-int8"):
        export_bundles([bundle, bundle], tmp_path / "out", "flat")

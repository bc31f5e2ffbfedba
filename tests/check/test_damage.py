"""No damaged or mislabelled bundle is ever accepted: over two hundred of them, made at random from a good one.

First as damage happens: the file changes, the manifest does not. Then with a manifest that was made to fit the damaged
files, so that hashes help no longer and the file's structure, storage and figures have to tell.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.bundle.manifest import FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.bundle import verify_bundle
from sa3_convert.components import Component
from sa3_convert.errors import Sa3Error
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.recipe import ComponentRecipe, load_recipe
from tests.check.conftest import COMPONENTS

Damage = Callable[[Path, np.random.Generator], None]

MODELS = [f"{c.value}.mnn" for c in COMPONENTS]
REFERENCES = [f"reference/{c.value}.onnx" for c in COMPONENTS]
FILES = [*MODELS, *REFERENCES, *(f"{name}.data" for name in REFERENCES), "recipe.yaml", "bottleneck_params.json"]


def is_accepted(folder: Path) -> bool:
    try:
        verify_bundle(Bundle.open(folder), quick=True, threads=2).check()
    except Sa3Error:
        return False
    return True


def test_the_bundle_that_all_others_are_made_from_is_accepted(two_models: Path) -> None:
    assert is_accepted(two_models)


def replaced(folder: Path, name: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path = folder / name
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip_a_bit(name: str) -> Damage:
    def damage(folder: Path, random: np.random.Generator) -> None:
        def flip(data: bytearray) -> bytearray:
            data[random.integers(len(data))] ^= 1 << int(random.integers(8))
            return data

        replaced(folder, name, flip)

    return damage


def truncate(name: str) -> Damage:
    return lambda folder, random: replaced(folder, name, lambda data: data[: random.integers(len(data))])


def extend(name: str) -> Damage:
    return lambda folder, random: replaced(folder, name, lambda data: data + bytes(random.integers(1, 5000)))


def remove(name: str) -> Damage:
    return lambda folder, random: (folder / name).unlink()


def lfs_pointer(name: str) -> Damage:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    return lambda folder, random: replaced(folder, name, lambda data: text)


def swap(first: str, second: str) -> Damage:
    def damage(folder: Path, random: np.random.Generator) -> None:
        one, other = folder / first, folder / second
        shutil.move(one, folder / "aside")
        shutil.move(other, one)
        shutil.move(folder / "aside", other)

    return damage


def plain_damage() -> Iterator[tuple[str, Damage]]:
    for name in FILES:
        for index in range(12):
            yield f"bit flip {index} in {name}", flip_a_bit(name)
        for index in range(4):
            yield f"truncation {index} of {name}", truncate(name)
        yield f"{name} extended", extend(name)
        yield f"{name} removed", remove(name)
        yield f"{name} a pointer", lfs_pointer(name)
    yield "models swapped", swap(*MODELS)
    yield "references swapped", swap(*REFERENCES)


PLAIN = list(plain_damage())


def test_no_bundle_with_a_damaged_file_is_accepted(copy_of: Callable[[], Path]) -> None:
    assert len(PLAIN) >= 150
    folder = copy_of()
    accepted = []
    for seed, (what, damage) in enumerate(PLAIN):
        before = {name: (folder / name).read_bytes() for name in FILES}
        damage(folder, np.random.default_rng(seed))
        if is_accepted(folder):
            accepted.append(what)
        for name, content in before.items():
            (folder / name).write_bytes(content)
    assert accepted == []
    assert is_accepted(folder)  # and putting everything back makes it good again


def refit(folder: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Make the manifest's hashes and sizes those of the files as they are, then change it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for artifact in manifest["artifacts"]:
        artifact.update(FileEntry.of(folder, artifact["path"]).model_dump())
        if artifact["companion"]:
            artifact["companion"] = FileEntry.of(folder, artifact["companion"]["path"]).model_dump()
    change(manifest)
    path.write_text(json.dumps(manifest))


def refitted(damage: Damage) -> Damage:
    def both(folder: Path, random: np.random.Generator) -> None:
        damage(folder, random)
        refit(folder)

    return both


def spoil_weights(name: str, share: float) -> Damage:
    """Put noise into a share of the bytes of one weight, the file's structure left whole."""

    def damage(folder: Path, random: np.random.Generator) -> None:
        weights = [weight.payload for _, weight in read_storage(folder / name).weighted()]
        extent = max(weights, key=lambda e: e.bytes)

        def spoil(data: bytearray) -> bytearray:
            count = max(1, int(extent.bytes * share))
            where = extent.offset + random.choice(extent.bytes, count, replace=False)
            for position in where.tolist():
                data[position] = int(random.integers(256))
            return data

        replaced(folder, name, spoil)

    return damage


def zero_weights(name: str) -> Damage:
    def damage(folder: Path, random: np.random.Generator) -> None:
        weights = [weight.payload for _, weight in read_storage(folder / name).weighted()]
        extent = weights[int(random.integers(len(weights)))]
        replaced(folder, name, lambda data: data[: extent.offset] + bytes(extent.bytes) + data[_end(extent) :])

    def _end(extent: Any) -> int:
        return int(extent.offset + extent.bytes)

    return damage


def say(component: Component, kind: str, **claims: Any) -> Damage:
    def damage(folder: Path, random: np.random.Generator) -> None:
        def change(manifest: dict[str, Any]) -> None:
            for artifact in manifest["artifacts"]:
                if artifact["component"] == component and artifact["kind"] == kind:
                    artifact.update(claims)

        refit(folder, change)

    return damage


def recipe_part(**changes: Any) -> Damage:
    """Another recipe of the same name in the bundle, with its right hash."""

    def damage(folder: Path, random: np.random.Generator) -> None:
        recipe = load_recipe(folder / "recipe.yaml")
        parts = {
            component: ComponentRecipe.model_validate(part.model_dump() | changes)
            for component, part in recipe.components.items()
        }
        (folder / "recipe.yaml").write_text(recipe.model_copy(update={"components": parts}).to_yaml())
        refit(folder)

    return damage


def relabelled(precision: str, changes: dict[str, Any]) -> Damage:
    """Recipe and manifest both say another precision than the file holds."""

    def damage(folder: Path, random: np.random.Generator) -> None:
        recipe_part(**changes)(folder, random)

        def change(manifest: dict[str, Any]) -> None:
            for artifact in manifest["artifacts"]:
                if artifact["kind"] == "mnn":
                    artifact["precision"] = precision

        refit(folder, change)

    return damage


def manifest_key(key: str, value: Any) -> Damage:
    def damage(folder: Path, random: np.random.Generator) -> None:
        refit(folder, lambda manifest: manifest.update({key: value}))

    return damage


def smaller_layout(folder: Path, random: np.random.Generator) -> None:
    refit(folder, lambda manifest: manifest["layout"]["dit"].update({"io_channels": 16}))


def fitted_damage() -> Iterator[tuple[str, Damage]]:
    for name in MODELS:
        for index in range(6):
            yield f"{name} truncated {index}", refitted(truncate(name))
            yield f"{name} with a zeroed weight {index}", refitted(zero_weights(name))
        for index in range(4):
            yield f"{name} with noise in a weight {index}", refitted(spoil_weights(name, 0.05))
        yield f"{name} a pointer", refitted(lfs_pointer(name))
    for name in REFERENCES:
        for index in range(3):
            yield f"{name}.data truncated {index}", refitted(truncate(f"{name}.data"))
        yield f"{name} a pointer", refitted(lfs_pointer(name))
    yield "models swapped", refitted(swap(*MODELS))
    yield "references swapped", refitted(swap(*REFERENCES))
    int4 = {"weights": {"bits": 4}}
    for component in COMPONENTS:
        for precision in ("fp32", "fp16", "int4"):
            yield f"{component} called {precision}", say(component, "mnn", precision=precision)
        yield f"{component} with a lower floor", say(component, "mnn", floor_db=1.0)
        yield (
            f"{component} with a better claim",
            say(component, "mnn", fidelity={"signal_to_noise_db": 90.0, "cosine": 1.0, "max_abs_error": 0.0}),
        )
        yield f"{component} with other storage", say(component, "mnn", storage={})
    yield "recipe with a floor that is not met", recipe_part(floor_db=70.0)
    for precision, changes in (
        ("int4", int4),
        ("fp32", {"weights": None}),
        ("fp16", {"weights": None, "floats": "fp16"}),
    ):
        yield f"recipe and manifest say {precision}", relabelled(precision, changes)
    yield "symmetric recipe", recipe_part(weights={"bits": 8, "symmetric": True})
    yield "stale recipe name", manifest_key("recipe", "fp16")
    yield "no models", manifest_key("artifacts", [])
    yield "another schema", manifest_key("schema", 2)
    yield "another layout", smaller_layout


FITTED = list(fitted_damage())


@pytest.mark.parametrize("index", range(len(FITTED)), ids=lambda index: FITTED[index][0].replace(" ", "-"))
def test_no_mislabelled_bundle_is_accepted_although_its_hashes_are_right(
    copy_of: Callable[[], Path], index: int
) -> None:
    folder = copy_of()
    FITTED[index][1](folder, np.random.default_rng(index))
    assert not is_accepted(folder)


def test_the_matrix_has_over_two_hundred_bundles() -> None:
    assert len(PLAIN) + len(FITTED) >= 200

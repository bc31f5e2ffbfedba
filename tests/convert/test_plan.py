"""What the dry run says is what `convert` then does, whatever stands there and whatever is asked for."""

import contextlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sa3_convert.bundle.manifest import MANIFEST, TOKEN_TABLE, Fidelity
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.cli import app as cli
from sa3_convert.components import Component
from sa3_convert.convert.cache import Notes, StageCache
from sa3_convert.convert.conversion import convert
from sa3_convert.convert.existing import SHARED
from sa3_convert.convert.plan import ConversionPlan, ConvertRequest, plan
from sa3_convert.convert.stages import (
    PLANNED,
    STAGES,
    STAGES_OF,
    ComponentJob,
    FidelityNotes,
    JudgedModelNotes,
    MnnNotes,
    ModelNotes,
    RoundNotes,
    Stage,
)
from sa3_convert.errors import Sa3Error, UsageError
from sa3_convert.recipe import load_recipe
from tests.bundles import CONFIGS, Convert, Runs
from tests.checkpoint.adapters import SECONDS, toy_adapter
from tests.convert.test_cache import damaged_data
from tests.convert.test_convert import with_component

FIDELITY = Fidelity(signal_to_noise_db=99.0, cosine=1.0, max_abs_error=0.0)


NOTES: dict[type[Notes], Notes] = {
    ModelNotes: ModelNotes(precision="fp32"),
    RoundNotes: RoundNotes(gains_db={}),
    MnnNotes: MnnNotes(precision="int8", storage={"types": {}}, passes={}, target_mnn="3.1"),
    FidelityNotes: FidelityNotes(fidelity=FIDELITY, floor_db=1),
    JudgedModelNotes: JudgedModelNotes(precision="int8", fidelity=FIDELITY, floor_db=1),
}


@pytest.fixture
def quick_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned is looked at here, not what the stages compute: they leave files of the names that they leave."""

    def make(stage: Stage, job: ComponentJob, folder: Path) -> Notes:
        for earlier in stage.reads:
            assert not STAGES[earlier].applies(job) or any(job.results[earlier].folder.iterdir())
        onnx = [f"{name}.data" for name in stage.leaves.values() if name.endswith(".onnx")]
        for name in (*stage.leaves.values(), *onnx, *([PLANNED] if stage.name == "round" else [])):
            (folder / name.format(job.component.value)).write_text(f"{folder.parent.name} {name}")
        return NOTES[stage.notes]

    monkeypatch.setattr(Stage, "make", make)


class World:
    """A checkpoint with and without adapters, some recipes, a bundle and a cache that are damaged now and then."""

    def __init__(self, toy: Path, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.out, self.cache = folder / "out", folder / "cache"
        adapter = LoraRequest(toy_adapter(folder / "warm.safetensors", toy, "lora", [SECONDS]), 0.5)
        plain = Checkpoint.open(toy)
        self.checkpoints = [plain, plain.with_loras([adapter]), plain.with_loras([replace(adapter, strength=-1.0)])]
        fp32, int8 = (load_recipe(CONFIGS / f"{name}.yaml") for name in ("fp32", "int8"))
        self.recipes = [fp32, int8, with_component(fp32, Component.DECODER, floor_db=1.5)]
        self.recipes += [
            with_component(fp32, Component.DIT, floats="fp16"),
            fp32.model_copy(update={"description": "x"}),
        ]

    def request(self) -> ConvertRequest:
        rng = self.rng

        def mostly(choices: list[Any]) -> Any:
            return choices[0] if rng.random() < 0.8 else rng.choice(choices)

        return ConvertRequest(
            checkpoint=mostly(self.checkpoints),
            recipe=mostly(self.recipes),
            out=self.out,
            cache=mostly([self.cache, self.cache.with_name("another")]),
            components=mostly([(), (Component.DIT,), (Component.DECODER, Component.NUMBER_CONDITIONER)]),
            force=rng.random() < 0.1,
            with_reference=rng.random() < 0.3,
            with_ort_int8=rng.random() < 0.3,
            with_onnx="fp16" if rng.random() < 0.3 else None,
            with_split_dit=rng.random() < 0.3,
            target_mnn=mostly([None, "3.6.0"]),
        )

    def damage(self) -> None:
        """Change, cut or remove a file of the bundle or the cache, or remove a whole result."""
        files = sorted(file for folder in (self.out, self.cache) for file in folder.rglob("*") if file.is_file())
        if not files or self.rng.random() < 0.4:
            return
        file = self.rng.choice(files)
        match self.rng.randrange(4):
            case 0:
                file.unlink()
            case 1:
                file.write_bytes(file.read_bytes()[:-1] + b"?")
            case 2:
                file.write_bytes(b"")
            case _:
                results = sorted(self.cache.glob("*/*"))
                shutil.rmtree(self.rng.choice(results)) if results else file.unlink()


def snapshot(*folders: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Return what would show that a file was written."""
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def files_placed(request: ConvertRequest, planned: ConversionPlan) -> set[str]:
    """Return the files of the bundle that a plan says are written."""
    written = {SHARED[kind] for kind in planned.shared} | ({MANIFEST} if not planned.up_to_date else set())
    if "tokenizer" in planned.shared:
        written.add(TOKEN_TABLE)
    for step in planned.steps:
        for kind in step.place:
            stage = STAGES[STAGES_OF[kind][0]]
            name = stage.leaves[kind].format(step.component.value)
            if not stage.folder:
                written.add(name)
            elif request.with_reference:
                written |= {f"{stage.folder}/{name}", f"{stage.folder}/{name}.data"}
    return written


def test_what_is_planned_is_what_is_done(quick_stages: None, toy: Path, tmp_path: Path) -> None:
    seen = {"refused": 0, "up to date": 0, "stages": 0, "files alone": 0, "dropped": 0}
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        world = World(toy, folder, seed)
        for _ in range(25):
            world.damage()
            check_one(world.request(), seen)
    assert all(count >= 3 for count in seen.values()), seen


def check_one(request: ConvertRequest, seen: dict[str, int]) -> None:
    for file in snapshot(request.out):
        # As files of their own: that one was linked anew to the same content would not show.
        shutil.copy(file, file.with_name("copy")).replace(file)
    before = snapshot(request.out, request.cache)
    planned = refusal = None
    with contextlib.suppress(UsageError):
        planned = plan(request)
    if planned is None:
        for refused in (plan, lambda request: convert(request, pytest.fail)):
            with pytest.raises(UsageError) as error:
                refused(request)
            refusal = refusal or str(error.value)
            assert str(error.value) == refusal
        assert snapshot(request.out, request.cache) == before
        seen["refused"] += 1
        return
    assert snapshot(request.out, request.cache) == before
    runs = Runs()
    outcome = convert(request, runs)
    assert outcome.up_to_date == planned.up_to_date
    assert runs.done() == {(step.component.value, stage) for step in planned.steps for stage in step.todo}
    reused = {(e.component.value, e.stage) for e in runs.events if e.state == "reused"}
    assert reused == {(step.component.value, stage) for step in planned.steps for stage in step.found}
    after = snapshot(request.out)
    written = {str(file.relative_to(request.out)) for file, state in after.items() if before.get(file) != state}
    assert written == files_placed(request, planned)
    check_bundle(request, outcome.bundle)
    seen["up to date"] += planned.up_to_date
    seen["stages"] += bool(runs.done())
    seen["files alone"] += not runs.done() and not planned.up_to_date
    seen["dropped"] += bool(planned.dropped)


def check_bundle(request: ConvertRequest, bundle: Bundle) -> None:
    """Check that everything that was asked for is there and whole, and that there is nothing left to do."""
    assert Bundle.open(request.out).manifest == bundle.manifest
    for component in request.selected():
        for kind in request.kinds(component):
            artifact = bundle.artifact(component, kind)
            assert bundle.is_whole(artifact)
            assert artifact.kept_at is None or not request.with_reference
    assert all(bundle.is_whole(bundle.artifact(None, kind)) for kind in SHARED)
    assert plan(replace(request, force=False)).up_to_date


@pytest.mark.parametrize("stage", ["mnn", "verify", "ort-int8", "onnx-fp16", "split"])
def test_a_result_without_the_notes_that_are_needed_is_made_again(
    quick_stages: None, toy: Path, tmp_path: Path, stage: str
) -> None:
    request = replace(World(toy, tmp_path, 0).request(), components=(), force=False, with_ort_int8=True)
    request = replace(request, with_onnx="fp16", with_split_dit=True, recipe=load_recipe(CONFIGS / "int8.yaml"))
    convert(request, lambda _: None)
    for step in plan(replace(request, force=True)).steps:
        if stage in step.keys:
            StageCache(request.cache).make(stage, step.keys[stage], lambda _: Notes(detail="alone"), replace=True)
    shutil.rmtree(request.out)
    planned = {step.component for step in plan(request).steps if stage in step.todo}
    assert planned
    runs = Runs()
    convert(request, runs)
    assert {(component.value, stage) for component in planned} == {one for one in runs.done() if one[1] == stage}


def test_a_manifest_that_was_damaged_is_refused_or_mended(quick_stages: None, toy: Path, tmp_path: Path) -> None:
    world = World(toy, tmp_path, 0)
    request = replace(world.request(), checkpoint=world.checkpoints[0], components=(), force=False, with_ort_int8=True)
    convert(request, lambda _: None)
    manifest = request.out / MANIFEST
    whole = json.loads(manifest.read_text())
    refused = 0
    for _ in range(300):
        manifest.write_text(json.dumps(damaged_data(whole, world.rng)))
        try:
            planned = plan(request)
        except Sa3Error:
            refused += 1
            continue
        assert all(request.out in (request.out / artifact.path).parents for artifact in planned.kept)
    assert refused < 150
    convert(replace(request, force=True), lambda _: None)
    check_bundle(request, Bundle.open(request.out))


def test_the_dry_run_of_a_finished_bundle_says_that_references_are_copied(
    converted: Convert, cache: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    converted(toy, "fp32", out)
    command = ["convert", str(toy), "--recipe", str(CONFIGS / "fp32.yaml"), "--out", str(out), "--cache", str(cache)]

    def dry_run(*options: str) -> str:
        capsys.readouterr()
        assert cli.run([*command, *options, "--dry-run"]) == 0
        return capsys.readouterr().out

    assert dry_run().count("up to date") == len(Component)
    said = dry_run("--with-reference")
    assert (said.count("place onnx"), said.count("up to date")) == (len(Component), 0)
    assert cli.run([*command, "--with-reference"]) == 0
    assert (out / "reference" / "dit.onnx.data").is_file()
    assert dry_run("--with-reference").count("up to date") == len(Component)
    assert dry_run().count("up to date") == len(Component)
    assert cli.run(command) == 0
    assert "nothing was done" in capsys.readouterr().out

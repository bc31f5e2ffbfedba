import tomllib
from pathlib import Path

import pytest
from huggingface_hub import constants

from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint, resolve_checkpoint
from sa3_convert.checkpoint.variants import MINIATURE, VARIANTS
from sa3_convert.errors import CheckpointError
from sa3_convert.lab.miniature.train import ADAPTER
from tests.checkpoint.test_hub import NEEDED, fill_cache
from tests.hub.server import COMMIT

ID = "someone/toy"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_path_that_exists_is_taken_as_it_is(small_toy: Path) -> None:
    assert resolve_checkpoint(str(small_toy)) == small_toy


def test_a_folder_wins_over_a_hub_id(
    small_toy: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, NEEDED)
    (tmp_path / ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(ID) == Path(ID)


@pytest.mark.parametrize("suffix", ["", "@main", f"@{COMMIT}"])
def test_a_cached_hub_id_is_found(small_toy: Path, cache: Path, suffix: str) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, NEEDED)
    folder = resolve_checkpoint(ID + suffix)
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").is_file()


def test_the_pinned_revision_is_preferred(small_toy: Path, cache: Path) -> None:
    variant = VARIANTS["small-music"]
    fill_cache(cache, small_toy, variant.hub_id, variant.revision, NEEDED)
    fill_cache(cache, small_toy, variant.hub_id, COMMIT, NEEDED)
    assert resolve_checkpoint(variant.hub_id).name == variant.revision


def test_another_revision_than_the_cached_one_is_not_taken(small_toy: Path, cache: Path) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, NEEDED)
    with pytest.raises(CheckpointError, match=f"at revision v2.*checkpoint fetch {ID} DIR --revision v2"):
        resolve_checkpoint(f"{ID}@v2")


def test_what_is_not_cached_says_how_to_fetch_it() -> None:
    with pytest.raises(CheckpointError, match=f"sa3-convert checkpoint fetch {ID} DIR"):
        resolve_checkpoint(ID)


def test_a_variants_name_says_how_to_get_one() -> None:
    with pytest.raises(
        CheckpointError, match=r"synthesize DIR --variant medium\..*fetch stabilityai/stable-audio-3-medium"
    ):
        resolve_checkpoint("medium")


@pytest.mark.parametrize("text", ["nowhere", "/nowhere/at/all", "", "a/b/c", "x y/z"])
def test_anything_else_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        resolve_checkpoint(text)


@pytest.mark.parametrize("text", ["a--b/c", "a/b..c", "a/b."])
def test_ids_that_the_hub_does_not_allow_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"not a valid hub id|neither a folder"):
        resolve_checkpoint(text)


@pytest.mark.parametrize("content", [f"{COMMIT}\n", f" {COMMIT}\r\n"])
def test_a_branch_whose_commit_ends_in_a_newline_is_found(small_toy: Path, cache: Path, content: str) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, NEEDED)
    (cache / "models--someone--toy" / "refs" / "main").write_text(content)
    assert resolve_checkpoint(ID).name == COMMIT


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../..", b"main", b"\0" * 40, COMMIT.encode() * 1000])
def test_a_branch_that_is_no_commit_is_not_cached(small_toy: Path, cache: Path, content: bytes) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, NEEDED)
    (cache / "models--someone--toy" / "refs" / "main").write_bytes(content)
    with pytest.raises(CheckpointError, match="neither a folder nor a checkpoint"):
        resolve_checkpoint(ID)


@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_blob_is_named_before_it_is_used(small_toy: Path, cache: Path, name: str) -> None:
    fill_cache(cache, small_toy, ID, COMMIT, NEEDED)
    blob = (cache / "models--someone--toy" / "snapshots" / COMMIT / name).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{blob.name} is damaged"):
        resolve_checkpoint(ID)


def test_the_miniature_is_there_by_its_id_in_an_installed_package_too() -> None:
    folder = resolve_checkpoint(MINIATURE)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.variant_name == "miniature"
    checkpoint.with_loras([LoraRequest(folder / ADAPTER)])
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 12_000_000
    configuration = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = configuration["tool"]["setuptools"]["package-data"]["sa3_convert.checkpoint"]
    here = folder.parent
    assert {path for pattern in shipped for path in here.glob(pattern) if path.is_file()} == {
        path for path in folder.rglob("*") if path.is_file()
    }

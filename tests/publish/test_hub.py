"""Publishing on a stand-in hub: one commit that is listed again, refusals, and a token that nobody sees."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from sa3_convert.bundle.hub import bring_bundle
from sa3_convert.bundle.manifest import UNVERIFIED, FileEntry
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.published import published_layout
from sa3_convert.checkpoint.variants import VARIANTS
from sa3_convert.cli import app as cli
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.hub import client as hub_client
from sa3_convert.publish import hub as publishing
from sa3_convert.publish.export import export_bundles
from tests.bundle.test_manifest import lora_entry, make_bundle
from tests.hub.server import Hub, serve

ID = "someone/models"
TOKEN = "hf_planted0token0that0nobody0sees"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A small bundle, which says that its weights are no random ones."""
    return make_bundle(tmp_path / "bundle", "small-music", "int8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without the repository, and somebody who may make it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_client, "PAUSE", 0.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(publishing, "is_synthetic", lambda _: False)
    monkeypatch.setattr("sa3_convert.publish.contract.golden_of", lambda _: {})
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty", ID, exists=False, token=TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        yield server


@pytest.fixture
def publish(bundle: Bundle, hub: Hub) -> Callable[..., int]:
    return lambda *words: cli.run(["bundle", "publish", str(bundle.path), "--to", ID, *words])


def tree_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_exports_tree_arrives_in_one_commit_and_its_id_is_told(
    publish: Callable[..., int], hub: Hub, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish() == 0
    export_bundles([bundle], tmp_path / "tree", "hub")
    meant = tree_of(tmp_path / "tree")
    assert hub.files.keys() == meant.keys() | {"card.png"} & hub.files.keys()
    named = {"README.md", "SHA256SUMS"}
    assert {n: c for n, c in hub.files.items() if n in meant.keys() - named} == {
        n: c for n, c in meant.items() if n not in named
    }
    assert ID in hub.files["README.md"].decode()
    shown = capsys.readouterr()
    assert shown.out == f"{ID}@{hub.revisions['main']}\n"
    assert len(hub.commits) == 1
    assert hub.requests[-1][1].endswith(f"/revision/{hub.revisions['main']}")


def test_what_was_published_is_what_a_client_gets(publish: Callable[..., int], hub: Hub, bundle: Bundle) -> None:
    assert publish() == 0
    opened = Bundle.open(bring_bundle(Path(f"{ID}/music/int8")))
    opened.check()
    assert {a.sha256 for a in opened.manifest.artifacts} == {a.sha256 for a in bundle.manifest.artifacts}


def test_a_dry_run_shows_files_and_card_and_asks_nobody(
    publish: Callable[..., int], hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert publish("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "music/int8/dit_music_int8.mnn" in shown
    assert "SHA256SUMS" in shown
    assert f"sa3-convert run {ID}" in shown or f"# {ID}" in shown or "# " in shown
    assert hub.requests == []


def test_a_second_time_nothing_is_uploaded_and_the_commit_is_the_same(
    publish: Callable[..., int], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish() == 0
    first = capsys.readouterr().out
    hub.requests.clear()
    assert publish() == 0
    assert capsys.readouterr().out == first
    assert [path for method, path, _ in hub.requests if method == "PUT"] == []
    assert len(hub.commits) == 1


def test_an_upload_that_broke_off_goes_on_with_the_files_that_are_missing(
    publish: Callable[..., int], hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail["commit"] = [0]
    assert publish() == 3
    assert "run the same command again" in capsys.readouterr().err
    assert hub.commits == []
    hub.fail.clear()
    hub.requests.clear()
    assert publish() == 0
    assert [path for method, path, _ in hub.requests if method == "PUT"] == []


@pytest.mark.parametrize("stage", ["create", "preupload", "batch", "upload", "commit"])
@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "token"), (403, "token"), (404, "has no"), (429, "busy"), (500, "busy"), (400, "refused"), (0, "network")],
)
def test_every_refusal_has_its_sentence(
    publish: Callable[..., int],
    hub: Hub,
    stage: str,
    status: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.fail[stage] = [status] * 100
    assert publish() == 3
    shown = capsys.readouterr()
    assert words in shown.err.splitlines()[-1]
    assert shown.out == ""
    assert hub.commits == []


def test_no_network_is_told(
    publish: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    assert publish() == 3
    assert "Check the network" in capsys.readouterr().err


def lost(files: dict[str, bytes]) -> None:
    del files["music/int8/dit_music_int8.mnn"]


def other(files: dict[str, bytes]) -> None:
    content = files["music/int8/dit_music_int8.mnn"]
    files["music/int8/dit_music_int8.mnn"] = bytes([content[0] ^ 1]) + content[1:]


def longer(files: dict[str, bytes]) -> None:
    files["music/int8/manifest.json"] += b"\n"


def respelled(files: dict[str, bytes]) -> None:
    files["NOTICE"] = files["NOTICE"].replace(b"Stability", b"Stabilitx")


@pytest.mark.parametrize(
    ("spoil", "name"), [(lost, "dit_music"), (other, "dit_music"), (longer, "manifest.json"), (respelled, "NOTICE")]
)
def test_what_the_hub_lists_afterwards_is_held_to_what_was_meant(
    publish: Callable[..., int], hub: Hub, spoil: Callable[..., None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.spoil = spoil
    assert publish() == 3
    assert "is not what was to be published: the hub lists something else, or nothing, for" in capsys.readouterr().err


def test_a_private_repository_is_made_and_a_public_one_is_not_taken_for_one(
    publish: Callable[..., int], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish("--private") == 0
    assert hub.private
    hub.private = False
    hub.commits.clear()
    assert publish("--private") == 3
    assert "is public. Nothing was published" in capsys.readouterr().err
    assert hub.commits == []


def test_a_pull_request_makes_no_repository(
    publish: Callable[..., int], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish("--create-pr") == 3
    assert "has no someone/models" in capsys.readouterr().err
    assert not hub.exists
    hub.exists = True
    assert publish("--create-pr") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{ID}@{hub.revisions['refs/pr/3']}\n"
    assert "pull request 3" in shown.err


def test_a_damaged_bundle_is_not_published(publish: Callable[..., int], hub: Hub, bundle: Bundle) -> None:
    model = bundle.file(Component.DIT)
    model.write_bytes(b"x" + model.read_bytes()[1:])
    assert publish() == 3
    assert hub.requests == []


def test_random_weights_and_loras_need_a_word_each(
    bundle: Bundle, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.manifest = bundle.manifest.model_copy(update={"loras": (lora_entry(),)})
    bundle.write()
    monkeypatch.setattr(publishing, "is_synthetic", lambda _: True)
    words = ["bundle", "publish", str(bundle.path), "--to", ID]
    assert cli.run(words) == 2
    assert "random weights" in capsys.readouterr().err
    assert cli.run([*words, "--allow", "lora"]) == 2
    assert cli.run([*words, "--allow", "synthetic"]) == 2
    assert "LoRAs in its weights: warm.safetensors:0.5" in capsys.readouterr().err
    assert hub.requests == []
    assert cli.run([*words, "--allow", "synthetic", "--allow", "lora"]) == 0


def test_random_weights_are_known_without_being_told(tmp_path: Path) -> None:
    layout = published_layout(VARIANTS["small-music"], "full")
    for deviation, expected in ((0.83, True), (0.8301, False)):
        bundle = make_bundle(tmp_path / str(deviation), "small-music", "int8")
        parameters = {"scaling_factor": [[[1.0]] * 256], "bias": [[[0.0]] * 256], "running_std": [deviation]}
        file = bundle.file(None, "bottleneck_params")
        file.write_text(json.dumps(parameters))
        entry = bundle.artifact(None, "bottleneck_params")
        new = entry.model_validate({**entry.model_dump(), **FileEntry.of(bundle.path, entry.path).model_dump()})
        kept = tuple(new if a is entry else a for a in bundle.manifest.artifacts)
        bundle.manifest = bundle.manifest.model_copy(update={"layout": layout, "artifacts": kept})
        assert publishing.is_synthetic(bundle) is expected


def test_models_that_nobody_verified_are_not_published(bundle: Bundle) -> None:
    bundle.manifest = bundle.manifest.model_copy(update={"recipe": UNVERIFIED})
    with pytest.raises(UsageError, match="nobody has verified its models"):
        publishing.require_publishable([bundle], ())


@pytest.mark.parametrize("name", ["models", "a/b/c", "a/b@main", "../x"])
def test_what_is_no_repository_is_refused(bundle: Bundle, hub: Hub, name: str) -> None:
    assert cli.run(["bundle", "publish", str(bundle.path), "--to", name]) == 2
    assert hub.requests == []


@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN}\nx", f"{TOKEN}\x7f", f"{TOKEN}ü"])
@pytest.mark.parametrize("stage", [None, "create", "preupload", "upload", "commit"])
def test_the_token_is_never_shown(
    publish: Callable[..., int],
    hub: Hub,
    bundle: Bundle,
    tmp_path: Path,
    token: str,
    stage: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    (tmp_path / "token").write_text(token)
    if stage is not None:
        hub.fail[stage] = [500] * 100
    figures = tmp_path / "figures.json"
    for words in (
        ["--debug", "--verbose", "bundle", "publish", str(bundle.path), "--to", ID],
        ["--debug", "inspect", ID, "--json", str(figures)],
        ["--debug", "table", f"{ID}/music/int8"],
    ):
        cli.run(words)
    shown = capfd.readouterr()
    # The repository that is made of a sound token's commands is there.
    assert (hub.commits != []) is (token == TOKEN and stage is None)
    assert TOKEN not in shown.out + shown.err
    assert not figures.exists() or TOKEN not in figures.read_text()
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "token"]
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]


def test_no_bar_is_shown_where_there_is_no_terminal(
    publish: Callable[..., int], hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    assert publish() == 0
    assert "\r" not in capfd.readouterr().err

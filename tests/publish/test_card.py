"""A card says what its inputs say: every number stands in one, and no word of theirs is Markdown, HTML or YAML."""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import sa3_convert.cli.app as cli
from sa3_convert.bundle.manifest import MANIFEST, Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.published import published_layout
from sa3_convert.checkpoint.variants import MINIATURE, VARIANTS
from sa3_convert.components import Component
from sa3_convert.errors import InputError, UsageError
from sa3_convert.publish.card import card, dots, placed
from sa3_convert.publish.export import Card, export_bundles
from sa3_convert.publish.measured import ReadBench, ReadReport, SelfTest, read_benches, read_reports
from tests.bundle.test_manifest import lora_entry, make_bundle, weights_apart, with_loras
from tests.lab.report.samples import component, made, report

SECTIONS = ("Model summary", "Performance", "Fidelity", "Quantisation strategy", "Architecture")
SECTIONS += ("Repository structure", "Usage", "Provenance", "Licences")


def values_in(data: Any) -> Iterator[Any]:
    """Yield every number and text of parsed JSON, keys too."""
    if isinstance(data, dict):
        yield from data
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from values_in(value)
    elif data is not None and not isinstance(data, bool):
        yield data


def spelled(value: float) -> set[str]:
    """Return every form in which a card may show a number."""
    forms = {f"{value:g}", f"{value:.1e}", *(f"{value:z.{digits}f}" for digits in (1, 2, 3, 4, 5)), f"{value:+z.2f}"}
    forms |= {f"{value / 2**20:.0f}", f"{value / 2**20:.1f}"}
    return forms | ({str(value)} if isinstance(value, int) else set())


def words(text: str) -> list[str]:
    """Return what has a digit in it, without what Markdown puts around it and what rows are called."""
    found = re.split(r"[\s`,()|/]+", text)
    return [word for word in found if re.search(r"\d", word) and word not in ("T5Gemma", "SHA-256")]


def derived(manifest: Mapping[str, Any]) -> set[str]:
    """Return the two figures that follow from several of a manifest: bytes of all models, and the longest audio."""
    files = [e for a in manifest["artifacts"] if a["kind"] == "mnn" for e in (a, a["companion"]) if e]
    total, layout = sum(entry["bytes"] for entry in files), manifest["layout"]
    return {f"{total / 2**20:.1f}", str(total), f"{layout['sample_size'] / layout['sample_rate']:.0f}"}


def rows_of(text: str) -> list[str]:
    """Return the lines of all tables below their heads."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [line for table in tables for line in table.splitlines()[2:]]


def untraced(text: str, *inputs: Any) -> list[str]:
    """Return the numbers in a card's tables that stand in none of its inputs."""
    known = set().union(*(derived(data) for data in inputs if "artifacts" in data))
    for value in values_in(list(inputs)):
        known |= {*words(value)} if isinstance(value, str) else spelled(value)
    return [word for row in rows_of(text) for word in words(row) if word not in known]


def commanded(*words: object) -> None:
    assert cli.run([str(word) for word in words]) == 0


def checked_card(bundle: Bundle, report: Path, bench: Path, folder: Path) -> tuple[str, list[Any]]:
    """Write a card with the command, trace its numbers, and return its text and its inputs."""
    out = folder / "README.md"
    commanded("bundle", "card", bundle.path, "--report", report, "--bench", bench, "-o", out)
    inputs = [json.loads(path.read_text()) for path in (bundle.path / MANIFEST, report, bench)]
    text = out.read_text()
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert untraced(text, *inputs) == []
    return text, inputs


@pytest.fixture(scope="module")
def measured(toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `verify --full --report` and `bench --json` say of a toy."""
    folder, bundle = tmp_path_factory.mktemp("measured"), toy_int8.path
    cases = ["--prompts", "0,6", "--seeds", "0", "--seconds", "0.5", "--steps", "3", "--threads", "2"]
    commanded("verify", bundle, "--quick", "--full", *cases, "--no-bisect", "--report", folder / "report")
    bench = ["--engine", "mnn", "--seconds", "0.5,1", "--repeats", "1", "--steps", "2", "--threads", "1"]
    commanded("bench", bundle, *bench, "--json", folder / "bench.json")
    return folder


def test_every_number_stands_in_an_input(toy_int8: Bundle, measured: Path, tmp_path: Path) -> None:
    text, inputs = checked_card(toy_int8, measured / "report" / "report.json", measured / "bench.json", tmp_path)
    assert len(rows_of(text)) > 60
    found = inputs[1]["components"][0]
    assert f"| {found['component']} | {found['spread']['count']} | {found['spread']['worst']:.1f} dB" in text
    row = next(row for row in inputs[2]["rows"] if row["temperature"] == "warm")
    assert f"| {row['seconds']['total']:.3f} s | {row['real_time_factor']:.2f} | " in text
    assert "its chaos floor" in text
    assert "![Size against fidelity, a dot for each component](README.png)" in text
    assert (tmp_path / "README.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_number_stands_in_an_input_at_true_size(tmp_path: Path) -> None:
    weights, out = tmp_path / "weights", tmp_path / "bundle"
    commanded("checkpoint", "synthesize", weights, "--variant", "small-music", "--size", "full")
    commanded("convert", weights, "--recipe", "int8", "--out", out, "--cache", tmp_path / "cache")
    commanded("verify", out, "--quick", "--no-bisect", "--report", tmp_path / "report")
    bench = ["--engine", "mnn-low", "--seconds", "2", "--repeats", "1", "--steps", "1"]
    commanded("bench", out, *bench, "--json", tmp_path / "bench.json")
    text, _ = checked_card(Bundle.open(out), tmp_path / "report" / "report.json", tmp_path / "bench.json", tmp_path)
    assert "These are not the published weights" in text
    assert "vocab size 256000, hidden size 768" in text


def test_a_number_that_stands_nowhere_is_found(toy_int8: Bundle) -> None:
    data = json.loads((toy_int8.path / MANIFEST).read_text())
    text = card(placed([toy_int8]))
    assert untraced(text, data) == []
    ratio = f"{data['artifacts'][0]['fidelity']['signal_to_noise_db']:.1f} dB"
    assert untraced(text.replace(ratio, "99.9 dB"), data) == ["99.9"]


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    text = card(placed([make_bundle(tmp_path)]))
    for section in ("Performance", "Fidelity", "Quantisation"):
        assert section not in text
    assert "![" not in text
    for line, after in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        assert not (line.startswith("| ---") and not after.startswith("|")), "an empty table"


def report_of(bundle: Bundle, folder: Path, **changes: Any) -> list[ReadReport]:
    """A report on a bundle's DiT."""
    artifact = bundle.artifact(Component.DIT)
    files = [{"path": entry.path, "bytes": entry.bytes, "sha256": entry.sha256} for entry in artifact.files]
    found = report(made=made(recipe=bundle.manifest.recipe), components=(component(),)).model_dump(mode="json")
    found["components"][0]["files"] = files
    path = folder / "report.json"
    path.write_text(json.dumps(found | changes))
    return read_reports([path])


def bench_of(bundle: Bundle, folder: Path, **changes: Any) -> list[ReadBench]:
    stages = ("text_encoder", "number_conditioner", "dit", "decoder", "other", "total")
    row = {"engine": "mnn", "duration": 10, "temperature": "warm", "seconds": dict.fromkeys(stages, 1.5)}
    row |= {"real_time_factor": 6.67, "peak_bytes": None}
    data = {"variant": bundle.manifest.label, "recipe": bundle.manifest.recipe, "machine": {}, "repeats": 3}
    data |= {"steps": None, "engines": {"mnn": {}}, "rows": [row]}
    data |= {"models": {"dit": bundle.artifact(Component.DIT).content}}
    path = folder / "bench.json"
    path.write_text(json.dumps(data | changes))
    return read_benches([path])


def test_findings_stand_beside_the_bundle_that_they_are_of(tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / precision, precision=precision) for precision in ("int8", "fp16")]
    reports, benches = report_of(bundles[1], tmp_path), bench_of(bundles[1], tmp_path)
    text = card(placed(bundles), reports, benches)
    for section in ("Performance", "Fidelity"):
        part = text.split(f"## {section}\n")[1].split("\n## ")[0]
        assert re.findall(r"^### (.*)$", part, re.MULTILINE) == ["`fp16`"]
    assert "peak memory" not in text
    assert "\n| part | dimensions |\n" in text
    assert [dot.bundle for dot in dots(placed(bundles), reports)] == ["fp16"]


SELFTEST: dict[str, Any] = {
    "schema": 1,
    "kind": "sa3-convert selftest",
    "passed": True,
    "device": "cuda",
    "variant": "small-music",
    "size": "toy",
    "surroundings": {
        "processor": "a processor",
        "versions": {"MNN": "3.6.1", "onnxruntime": "1.31.1", "torch": "2.13.0"},
        "gpus": [{"name": "a GPU", "driver": "600.1", "memory_bytes": 1 << 36}],
        "cuda_driver": "a GPU (compute capability 9.0)",
    },
    "absent": {"mnn": "MNN is built without CUDA."},
    "golden": [{"engine": "torch", "what": "its audio", "of_peak": 7.2e-7, "limit": 1e-3, "passes": True}],
    "findings": [
        {"engine": "torch-fp16", "what": "dit", "floor_db": 50, "db": 60.04, "again_db": 59.91, "passes": True},
        {"engine": "torch-fp16", "what": "latents", "floor_db": 20, "db": None, "again_db": None, "passes": True},
    ],
    "rows": [
        {
            "engine": "torch-fp16",
            "duration": 30.0,
            "temperature": "warm",
            "seconds": dict.fromkeys(("text_encoder", "number_conditioner", "dit", "decoder", "other", "total"), 0.125),
            "real_time_factor": 240.0,
            "peak_bytes": None,
            "device_bytes": 1234 << 20,
        }
    ],
}


def selftest_of(folder: Path, **changes: Any) -> Path:
    path = folder / "selftest.json"
    path.write_text(json.dumps(SELFTEST | changes))
    return path


def test_a_selftest_has_a_section_that_says_whose_models_it_is_of(toy_int8: Bundle, tmp_path: Path) -> None:
    file, out = selftest_of(tmp_path), tmp_path / "README.md"
    commanded("bundle", "card", toy_int8.path, "--selftest", file, "-o", out)
    text = out.read_text()
    assert untraced(text, *(json.loads(path.read_text()) for path in (toy_int8.path / MANIFEST, file))) == []
    section = text.split("## Self-test\n")[1].split("\n## ")[0]
    assert "on `cuda` passed" in section
    assert "none of them is a model of this card" in section
    for figure in (
        "| 240.00 | 1234 MiB |",
        "| `torch-fp16` | 59.9 dB | failed |",
        "| `its audio` | 7.2e-07 |",
        "`600.1`",
    ):
        assert figure in section
    assert "MNN is built without" not in section
    selftest_of(tmp_path, golden=[SELFTEST["golden"][0] | {"passes": False}])
    commanded("bundle", "card", toy_int8.path, "--selftest", file, "-o", out)
    assert "on `cuda` **failed**" in out.read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": "full"}, "small-music of full size, whose dimensions none of the bundles has"),
        ({"variant": "medium"}, "medium of toy size, whose dimensions none"),
        ({"variant": "x"}, "dimensions none of the bundles has"),
        ({"kind": "other"}, "no result of `sa3-convert selftest"),
        ({"passed": "yes"}, "passed: "),
        ({"device": "| x"}, "device: "),
        ({"rows": [SELFTEST["rows"][0] | {"real_time_factor": "240"}]}, "real_time_factor: "),
        ({"findings": [SELFTEST["findings"][0] | {"db": float("nan")}]}, "no result of"),
        ({"absent": {"| x": ""}}, "no result of"),
    ],
)
def test_what_is_no_selftest_of_such_models_is_refused(
    changes: dict[str, Any], reason: str, toy_int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = selftest_of(tmp_path, **changes), tmp_path / "README.md"
    assert (
        cli.run(["bundle", "card", str(toy_int8.path), "--selftest", str(file), "-o", str(out)]) == InputError.exit_code
    )
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.parametrize("is_apart", [False, True])
def test_findings_on_other_models_are_refused(tmp_path: Path, is_apart: bool) -> None:
    bundle, other = make_bundle(tmp_path / "b"), make_bundle(tmp_path / "other", salt="" if is_apart else "x")
    if is_apart:
        # The graph of another checkpoint is the same.
        bundle, other = weights_apart(bundle, b"a"), weights_apart(other, b"b")
        assert bundle.artifact(Component.DIT).sha256 == other.artifact(Component.DIT).sha256
        assert card(placed([bundle]), report_of(bundle, tmp_path), bench_of(bundle, tmp_path))
    manifests = placed([bundle])
    with pytest.raises(InputError, match="another dit than the bundle's"):
        card(manifests, report_of(other, tmp_path))
    with pytest.raises(InputError, match="another dit than the bundle's"):
        card(manifests, (), bench_of(other, tmp_path))
    with pytest.raises(InputError, match="none of the bundles"):
        card(manifests, (), bench_of(bundle, tmp_path, recipe="fp16"))
    with pytest.raises(InputError, match=r"written by an earlier version.*Measure again"):
        card(manifests, (), bench_of(bundle, tmp_path, models={}))
    with pytest.raises(UsageError, match="of the same bundle"):
        card(manifests, report_of(bundle, tmp_path) * 2)
    with pytest.raises(UsageError, match="no hub id"):
        card(manifests, name="x) [y](http://z")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "sa3-convert verification"}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="no report of"):
        read_reports([tmp_path])


HOSTILE = "x` <img src=x> | https://evil.example [a](b) ``` *c* $d$ &lt; ---"


def test_words_from_files_are_neither_markdown_nor_html_nor_yaml(tmp_path: Path) -> None:
    plain = with_loras(make_bundle(tmp_path), lora_entry(f"{HOSTILE}.safetensors".replace("/", "-")))
    origin = plain.manifest.checkpoint.model_copy(update={"source": HOSTILE})
    changed = plain.manifest.model_copy(update={"checkpoint": origin, "tools": {"MNN": HOSTILE}})
    bundle = Bundle(tmp_path, Manifest.model_validate_json(changed.to_json()))
    generations = report().model_dump(mode="json")
    generations["end_to_end"]["cases"][0]["prompt"] = HOSTILE
    generations["generations"]["distributions"][0]["name"] = HOSTILE
    given = {key: generations[key] for key in ("generations", "end_to_end")}
    about = made(recipe="int8", variant=bundle.manifest.label).model_dump(mode="json")
    machine = {"processor": HOSTILE, "system": HOSTILE, "versions": {"MNN": HOSTILE}}
    words = machine | {"gpus": [], "cuda_driver": HOSTILE}
    file = selftest_of(tmp_path, surroundings=words, golden=[SELFTEST["golden"][0] | {"what": HOSTILE}])
    text = card(
        placed([bundle]),
        report_of(bundle, tmp_path, made=about, **given),
        bench_of(bundle, tmp_path, machine=machine),
        [SelfTest.read(file, {"": bundle.manifest})],
    )
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front).keys() == {
        "license", "license_name", "license_link", "library_name", "pipeline_tag", "tags"
    }  # fmt: skip
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert "<img" not in page
    assert re.findall(r'<a href="([^"]*)"', page) == [
        "https://stability.ai/license",
        "https://ai.google.dev/gemma/terms",
    ]
    assert "<em>" not in page
    assert page.count("&lt;img src=x&gt; | https://evil.example [a](b) ``` *c* $d$ &amp;lt; ---</code>") == 13


def test_the_front_matter_names_the_model_and_the_licence(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path)
    origin = plain.manifest.checkpoint.model_copy(update={"source": "stabilityai/stable-audio-3-small-music"})
    layout = published_layout(VARIANTS["small-music"], "full")
    text = card({"": plain.manifest.model_copy(update={"checkpoint": origin, "layout": layout})})
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["base_model"] == ["stabilityai/stable-audio-3-small-music"]
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == ("other", "mnn", "text-to-audio")
    assert {"mnn", "int8"} <= set(data["tags"])


def test_the_miniature_is_under_our_own_licence_and_nobody_s_model(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path).manifest
    origin = plain.checkpoint.model_copy(update={"source": MINIATURE})
    layout = replace(plain.layout, source_id=MINIATURE)
    ours = plain.model_copy(update={"checkpoint": origin, "layout": layout})
    text = card({"": ours})
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["license"] == "apache-2.0"
    assert "base_model" not in data
    assert "stability.ai" not in text
    assert "Gemma Terms" not in text
    both = card({"a": ours, "b": plain})
    assert yaml.safe_load(both.split("---\n")[1])["license"] == "other"
    assert "Apache-2.0" in both
    assert "Gemma Terms" in both


def test_an_autoencoder_alone_is_no_text_to_audio(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path).manifest
    layout = replace(plain.layout, dit=None, text_encoder=None, number_conditioner=None, objective=None)
    models = tuple(a for a in plain.artifacts if a.component in (Component.DECODER, Component.ENCODER))
    text = card({"": plain.model_copy(update={"layout": layout, "artifacts": models})})
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "audio-to-audio"
    for word in ("Text to audio", "Gemma", "sa3-convert run"):
        assert word not in text


def test_weights_that_are_random_are_told(toy_int8: Bundle, tmp_path: Path) -> None:
    assert toy_int8.manifest.checkpoint.synthetic
    text = card(placed([toy_int8]))
    assert "These are not the published weights" in text
    assert "base_model" not in text


def test_commands_can_be_copied(toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "hub"
    export_bundles([toy_int8], out, "hub", card=Card(name="me/models"))
    text = (out / "README.md").read_text()
    download, run = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()  # type: ignore[index]
    assert download == "hf download me/models --local-dir models"
    out.rename(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert run.startswith("sa3-convert run models/music/int8 --prompt ")
    assert cli.run(shlex.split(run)[1:]) == 0
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("seconds=10", "seconds=0.5")  # type: ignore[index]
    exec(code, names := {})
    assert names["piece"].audio.shape[0] == 2


def test_without_the_packages_that_draw_the_card_has_no_picture(
    toy_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("sa3_convert.lab.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(["bundle", "card", str(toy_int8.path), "-o", str(tmp_path / "README.md")]) == 0
    assert "The card has no picture" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "![" not in (tmp_path / "README.md").read_text()


def test_an_exports_readme_is_its_card(toy_int8: Bundle, measured: Path, tmp_path: Path) -> None:
    given = ["--report", str(measured / "report"), "--bench", str(measured / "bench.json")]
    assert cli.run(["bundle", "export", str(toy_int8.path), "--to", str(tmp_path / "hub"), *given]) == 0
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "## Performance" in text
    assert "`music/int8/dit_music_int8.mnn`" in text
    assert "README.png" in (tmp_path / "hub" / "SHA256SUMS").read_text()
    exported = Bundle.open(tmp_path / "hub")
    assert "`music/int8/dit_music_int8.mnn`" in card(placed([exported]), read_reports([measured / "report"]))

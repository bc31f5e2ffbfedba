"""`README.md` of published models: a Hugging Face model card, made of manifests, reports and benches alone.

A figure that nobody measured is left out, and so is a table without rows. Words that come from files stand in code
spans, where neither Markdown nor HTML means anything; the front matter is written by the YAML library.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import quote

import yaml

from sa3_convert.bundle.manifest import MANIFEST, Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.bundle.table import markdown_code
from sa3_convert.checkpoint.variants import VARIANTS, is_miniature, size_of
from sa3_convert.components import Component
from sa3_convert.errors import UsageError
from sa3_convert.hub.files import is_repository
from sa3_convert.publish.contract import least_mnn
from sa3_convert.publish.licences import generates, licences
from sa3_convert.publish.measured import ReadBench, ReadReport, Report, SelfTest, by_bundle, one_report
from sa3_convert.publish.tables import (
    Lines,
    adapters,
    fidelity,
    models_of,
    selftest,
    side_by_side,
    size,
    speed,
    storage,
    table,
)
from sa3_convert.system.untrusted import printable

_SYNTHETIC: Final = """\
> **These are not the published weights.** They are random numbers in the shapes of {what}, made to test the tools: what
> comes out is noise, and no figure here says anything about the published model.
"""


def placed(bundles: Sequence[Bundle]) -> dict[str, Manifest]:
    """Return bundles by the folder of their manifests, seen from the folder that the card is for.

    A bundle of its own is that folder; several are folders in it. Exported ones keep their places in their tree.

    Raises:
        UsageError: two of them would be one folder.

    """
    roots = {os.path.realpath(bundle.root) for bundle in bundles}
    if len(roots) == 1:
        root = roots.pop()
        folders = [os.path.relpath(os.path.realpath(bundle.path), root) for bundle in bundles]
    else:
        folders = [bundle.path.resolve().name for bundle in bundles]
    if len(set(folders)) < len(bundles):
        raise UsageError("Two of the bundles have the same name. Give each once, and each a folder of its own name.")
    # A line break in a name would end the line of a command.
    names = [" ".join(printable(Path(folder).as_posix()).split()) for folder in folders]
    return {"" if name == "." else name: bundle.manifest for name, bundle in zip(names, bundles, strict=True)}


@dataclasses.dataclass(frozen=True, slots=True)
class Dot:
    """A model in the picture of a card."""

    bundle: str
    component: str
    bytes: int
    worst_db: float


def dots(manifests: Mapping[str, Manifest], reports: Sequence[ReadReport]) -> list[Dot]:
    """Return the models whose fidelity is known, by their report or else by their conversion."""
    told = {folder: one_report(found) for folder, found in by_bundle(manifests, reports).items()}
    found = []
    for folder, manifest in manifests.items():
        report = told[folder]
        ratios = {c: a.fidelity.signal_to_noise_db for c, a in models_of(manifest).items() if a.fidelity is not None}
        ratios |= {model.component: model.spread.worst for model in report.models} if report is not None else {}
        for component, artifact in models_of(manifest).items():
            if component in ratios:
                size = artifact.total_bytes
                found.append(Dot(folder or manifest.label, component.value, size, ratios[component]))
    return found


def card(
    manifests: Mapping[str, Manifest],
    reports: Sequence[ReadReport] = (),
    benches: Sequence[ReadBench] = (),
    selftests: Sequence[SelfTest] = (),
    *,
    name: str | None = None,
    picture: str | None = None,
    usage: Mapping[str, Sequence[str]] = {},
) -> str:
    """Return the text of `README.md`; the same arguments give the same text.

    Args:
        manifests: by folder, "" for the card's own; see `placed`.
        reports: at most one of each bundle.
        benches: of any machines.
        selftests: of any devices.
        name: the hub id that the files will have.
        picture: name of the file beside the card that shows its `dots`.
        usage: more lines about how a bundle is used, by its folder.

    Raises:
        InputError: a report or a bench is of other models.
        UsageError: two reports are of one bundle, or the name is no hub id.
        BundleError: a manifest's account of its storage cannot be read.

    """
    if name is not None and not is_repository(name):
        raise UsageError(f"{name!r} is no hub id (owner/name).")
    told = {folder: one_report(found) for folder, found in by_bundle(manifests, reports).items()}
    timed = by_bundle(manifests, benches)

    def each(title: str, block: Callable[[str, Manifest], Lines]) -> Lines:
        """Return a section with a part for each bundle that has something to say."""
        parts = {folder: block(folder, manifest) for folder, manifest in manifests.items()}
        several = len(manifests) > 1
        heads = {folder: [f"### {markdown_code(folder or '.')}", ""] if several else [] for folder in parts}
        lines = [line for folder, part in parts.items() if part for line in (*heads[folder], *part)]
        return [f"## {title}", "", *lines] if lines else []

    lines = [*_front_matter(manifests), *_title(manifests)]
    lines += ["## Model summary", "", *_summary(manifests)]
    if picture is not None:
        lines += [f"![Size against fidelity, a dot for each component]({quote(picture)})", ""]
    lines += each("Performance", lambda folder, _: [line for read in timed[folder] for line in speed(read.found)])
    lines += each("Fidelity", lambda folder, manifest: fidelity(manifest, told[folder]))
    told_of_devices = [line for found in selftests for line in selftest(found)]
    lines += ["## Self-test", "", *told_of_devices] if told_of_devices else []
    lines += each("Quantisation strategy", lambda _, manifest: storage(manifest))
    lines += each("Adapters", lambda _, manifest: adapters(manifest))
    lines += ["## Architecture", "", *_architecture(manifests)]
    lines += ["## Repository structure", "", *_structure(manifests)]
    lines += ["## Usage", "", *_usage(manifests, name, usage)]
    lines += each("Provenance", lambda folder, manifest: _provenance(manifest, told[folder]))
    lines += ["## Licences", "", *licences(manifests.values())]
    return "\n".join([*lines, ""])


def _front_matter(manifests: Mapping[str, Manifest]) -> Lines:
    found = manifests.values()
    # Random weights are quantised from nobody's model, and the miniature is on no hub.
    trained = (m.checkpoint.source for m in found if not (_is_synthetic(m) or is_miniature(m.layout)))
    sources = sorted({source for source in trained if is_repository(source)})
    precisions = sorted({a.precision for m in found for a in m.artifacts if a.kind == "mnn" and a.precision})
    tags = ["mnn", "stable-audio-3", "audio-generation", *precisions]
    data: dict[str, Any] = {"base_model": sources, "base_model_relation": "quantized"} if sources else {}
    if all(is_miniature(m.layout) for m in found):
        data["license"] = "apache-2.0"
    else:
        data |= {"license": "other", "license_name": "stability-ai-community"}
        data["license_link"] = "https://stability.ai/license"
    data["library_name"] = "mnn"
    data["pipeline_tag"] = "text-to-audio" if generates(manifests.values()) else "audio-to-audio"
    data["tags"] = [*tags, *(["synthetic-weights"] if any(map(_is_synthetic, found)) else [])]
    return ["---", yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _title(manifests: Mapping[str, Manifest]) -> Lines:
    variants = list(dict.fromkeys(m.variant for m in manifests.values() if m.variant in VARIANTS))
    lines = [" ".join(["# Stable Audio 3", *([", ".join(variants)] if variants else []), "for MNN"]), ""]
    what = "Text to audio" if generates(manifests.values()) else "An audio autoencoder"
    lines += [f"{what} on devices, converted and quantised by sa3-convert.", ""]
    if synthetic := [m for m in manifests.values() if _is_synthetic(m)]:
        what = ", ".join(markdown_code(label) for label in dict.fromkeys(m.label for m in synthetic))
        lines += [*_SYNTHETIC.format(what=what).splitlines(), ""]
    return lines


def _is_synthetic(manifest: Manifest) -> bool:
    return manifest.checkpoint.synthetic or size_of(manifest.layout) == "toy"


def _by_folder(manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Return bundles by what heads their columns; a bundle alone needs no name."""
    alone = len(manifests) == 1
    return {"" if alone else markdown_code(folder or "."): manifest for folder, manifest in manifests.items()}


def _summary(manifests: Mapping[str, Manifest]) -> Lines:
    return side_by_side("", {head: _facts(manifest) for head, manifest in _by_folder(manifests).items()})


def _facts(manifest: Manifest) -> dict[str, str | None]:
    models = models_of(manifest)
    layout = manifest.layout
    facts: dict[str, str | None] = {
        "model": markdown_code(manifest.label),
        "recipe": markdown_code(manifest.recipe),
        "least MNN": least_mnn(manifest) if any(a.target_mnn for a in models.values()) else None,
        "sample rate": f"{layout.sample_rate} Hz, {layout.autoencoder.audio_channels} channels",
        "longest audio": f"{layout.sample_size} samples ({layout.sample_size / layout.sample_rate:.0f} s)",
        "all models": size(sum(a.total_bytes for a in models.values())),
    }
    return facts | {
        component.value: ", ".join([size(artifact.total_bytes), *([artifact.precision] if artifact.precision else [])])
        for component, artifact in models.items()
    }


def _architecture(manifests: Mapping[str, Manifest]) -> Lines:
    """Return a column for all bundles of the same dimensions."""
    alike: dict[tuple[tuple[str, str | None], ...], list[str]] = {}
    for head, manifest in _by_folder(manifests).items():
        alike.setdefault(tuple(_dimensions(manifest).items()), []).append(head)
    heads = {", ".join(found) if len(alike) > 1 else "dimensions": dict(facts) for facts, found in alike.items()}
    return side_by_side("part", heads)


def _dimensions(manifest: Manifest) -> dict[str, str | None]:
    layout = manifest.layout
    auto = layout.autoencoder
    parts = {
        "text encoder (T5Gemma)": layout.text_encoder,
        "number conditioner": layout.number_conditioner,
        "DiT": layout.dit,
        "decoder (SAME)": auto.decoder,
        "encoder (SAME)": auto.encoder,
    }
    found: dict[str, str | None] = {
        part: ", ".join(_dimension(f.name, getattr(sizes, f.name)) for f in dataclasses.fields(sizes))
        for part, sizes in parts.items()
        if sizes is not None
    }
    names = ("audio_channels", "patch_size", "latent_dim", "downsampling_ratio")
    return found | {"autoencoder": ", ".join(_dimension(name, getattr(auto, name)) for name in names)}


def _dimension(name: str, value: object) -> str:
    match value:
        case bool() | None:
            shown = "yes" if value else "no"
        case tuple():
            shown = " and ".join(map(str, value))
        case _:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {shown}"


def _structure(manifests: Mapping[str, Manifest]) -> Lines:
    files = {
        os.path.normpath(PurePosixPath(folder, manifest.base, entry.path)): (entry, artifact)
        for folder, manifest in manifests.items()
        for artifact in manifest.artifacts
        if artifact.kept_at is None
        for entry in artifact.files
    }
    rows: list[list[str | None]] = [
        [markdown_code(path), artifact.component and artifact.component.value, size(entry.bytes), f"`{entry.sha256}`"]
        for path, (entry, artifact) in sorted(files.items())
    ]
    kept = ", ".join(markdown_code(str(PurePosixPath(folder, MANIFEST))) for folder in manifests)
    return [*table(["file", "component", "size", "SHA-256"], rows), f"Where each file came from: {kept}.", ""]


def _usage(manifests: Mapping[str, Manifest], name: str | None, more: Mapping[str, Sequence[str]]) -> Lines:
    here = "." if name is None else name.rpartition("/")[2]
    commands = [] if name is None else [f"hf download {name} --local-dir {here}"]
    needed = {component for component in Component if component is not Component.ENCODER}
    folders = [str(PurePosixPath(here, f)) for f, manifest in manifests.items() if needed <= models_of(manifest).keys()]
    commands += [
        f'sa3-convert run {shlex.quote(folder)} --prompt "warm analog synth pad" --seconds 10 -o pad.wav'
        for folder in folders
    ]
    lines = ["```bash", *commands, "```", ""] if commands else []
    if folders:
        code = [
            "from pathlib import Path",
            "",
            "from sa3_convert.api import GenerateRequest, Pipeline",
            "",
            f"with Pipeline.from_bundle(Path({json.dumps(folders[0])})) as pipeline:",
            '    piece = pipeline.generate(GenerateRequest("warm analog synth pad", seconds=10, seed=7))',
        ]
        lines += ["```python", *code, "```", ""]
    return [*lines, *(line for folder in manifests for line in more.get(folder, ()))]


def _provenance(manifest: Manifest, report: Report | None) -> Lines:
    origin = manifest.checkpoint
    facts: dict[str, str | None] = {
        "checkpoint": markdown_code(origin.source),
        "revision": None if origin.revision is None else f"`{origin.revision}`",
        "recipe": markdown_code(manifest.recipe),
        **{f"tensors of {component.value}, SHA-256": f"`{digest}`" for component, digest in origin.digests.items()},
        **{f"LoRA {number}": markdown_code(lora.label) for number, lora in enumerate(manifest.loras, 1)},
        "converted with": _versions(manifest.tools),
        "verified with": None if report is None else _versions(report.made.verified_with),
    }
    return side_by_side("", {"": facts})


def _versions(tools: Mapping[str, str]) -> str | None:
    return ", ".join(f"{markdown_code(tool)} {markdown_code(version)}" for tool, version in tools.items()) or None

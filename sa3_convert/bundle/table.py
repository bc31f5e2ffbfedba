"""Bundles side by side as Markdown, from what their manifests say."""

from collections.abc import Sequence

from sa3_convert.bundle.manifest import Artifact, Bundle
from sa3_convert.components import Component


def markdown_table(bundles: Sequence[Bundle]) -> str:
    """Return one row per bundle: variant, recipe, size and fidelity of each component, and the size of all models.

    Fidelity is the worst signal-to-noise ratio, in dB, that the conversion measured against ONNX Runtime on the fp32
    reference. Components that no bundle has get no column; one that a bundle lacks is a dash.
    """
    present = {component for bundle in bundles for component in bundle.components}
    components = [component for component in Component if component in present]
    header = ["variant", "recipe", *(component.value for component in components), "all"]
    rows = [header, ["---"] * len(header), *(_row(bundle, components) for bundle in bundles)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(bundle: Bundle, components: Sequence[Component]) -> list[str]:
    models = {component: bundle.artifact(component) for component in bundle.components}
    cells = [_cell(models[component]) if component in models else "–" for component in components]
    total = sum(_bytes(model) for model in models.values())
    return [bundle.manifest.variant, f"`{bundle.manifest.recipe}`", *cells, f"{total / 2**20:.1f} MiB"]


def _cell(model: Artifact) -> str:
    size = f"{_bytes(model) / 2**20:.1f} MiB"
    return size if model.fidelity is None else f"{size}, {model.fidelity.signal_to_noise_db:.1f} dB"


def _bytes(model: Artifact) -> int:
    return sum(entry.bytes for entry in model.files)

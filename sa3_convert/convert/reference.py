"""Models that others published, compared with references exported from the checkpoint that they say they are of."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa3_convert.bundle.foreign import contradictions
from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.compare import Outputs, compare_runs, run_samples
from sa3_convert.check.inputs import samples_for
from sa3_convert.check.metrics import MAX_DB
from sa3_convert.check.results import BundleFidelity, Verdict
from sa3_convert.components import Component, contract
from sa3_convert.errors import VerificationError
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.runtime.engines import bundle_engine

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint


def verify_against(
    bundle: Bundle,
    checkpoint: "Checkpoint",
    *,
    components: tuple[Component, ...] = (),
    quick: bool = False,
    threads: int | None = None,
    report: Callable[[Verdict], None] = lambda _: None,
) -> BundleFidelity:
    """Compare a bundle's `.mnn` models with references that are exported from a checkpoint for it.

    No recipe is known, so there is no floor: the figures are told, and wrong is what contradicts itself (a name that
    says another precision than the file has) or shows a known mistake (a weight norm that was not fused).

    Raises:
        VerificationError: a model has other inputs or outputs than the checkpoint's, or gives what cannot be compared.
        ConversionError: a reference cannot be exported.

    """
    selected = components or bundle.components
    for component in selected:
        if contract(component, bundle.layout) != contract(component, checkpoint.layout):
            raise VerificationError(
                f"The {component.value} of {bundle.path} has other dimensions than {checkpoint.folder}. "
                "Give the checkpoint that it was converted from."
            )
    bundle.check(selected)
    verdicts, wrong = [], []
    for component in selected:
        verdict, found = _compared(bundle, checkpoint, component, quick, threads)
        verdicts.append(verdict)
        wrong += found
        report(verdict)
    return BundleFidelity(bundle.manifest.label, bundle.manifest.recipe, tuple(verdicts), tuple(wrong))


def _compared(
    bundle: Bundle, checkpoint: "Checkpoint", component: Component, quick: bool, threads: int | None
) -> tuple[Verdict, list[str]]:
    from sa3_convert.export.component import export_component
    from sa3_convert.ort import OrtSession

    artifact, samples = bundle.artifact(component), samples_for(component, checkpoint.layout, quick=quick)
    actual = run_samples(bundle_engine(bundle, "mnn", {"threads": threads}).load(component), samples)
    wrong = list(contradictions(Path(artifact.path).name, read_storage(bundle.checked(component).path)))
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        reference = Path(folder) / f"{component.value}.onnx"
        export_component(checkpoint, component, reference)
        expected = run_samples(OrtSession(reference, threads=threads), samples)
        fidelity = compare_runs(component, checkpoint.layout, samples, expected, actual)
        for mistaken in _with_whole_norm(reference):
            if _makes(expected, run_samples(OrtSession(mistaken, threads=threads), samples), actual):
                wrong.append(
                    f"{artifact.path}: its weight norm was not fused before conversion, so MNN took the norm of the "
                    f"whole weight instead of each output channel's ({fidelity.worst.signal_to_noise_db:.1f} dB)."
                )
    return Verdict(component, fidelity.measurements, -MAX_DB, artifact.precision or ""), wrong


def _makes(expected: Sequence[Outputs], mistaken: Sequence[Outputs], actual: Sequence[Outputs]) -> bool:
    """Tell whether a model's error points to a mistake: by more than half of the way from right to mistaken."""
    along = length = 0.0
    for right, wrong, found in zip(expected, mistaken, actual, strict=True):
        for name, array in right.items():
            way = (wrong[name] - array).astype(np.float64)
            along += float(np.vdot(way, found[name] - array))
            length += float(np.vdot(way, way))
    return along > length / 2 > 0


def _with_whole_norm(reference: Path) -> Iterator[Path]:
    """Yield the reference with the mistake that MNN makes of a weight norm: a reduction over all axes."""
    import onnx

    model = onnx.load(reference, format="protobuf", load_external_data=False)
    sums = [node for node in model.graph.node if node.op_type == "ReduceSum" and ".mapping." in node.output[0]]
    for node in sums:
        del node.input[1:]
    if sums:
        path = reference.with_name(f"mistaken-{reference.name}")
        onnx.save(model, path, format="protobuf")
        yield path

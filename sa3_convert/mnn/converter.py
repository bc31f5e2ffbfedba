"""ONNX → `.mnn`, by MNN's converter in a process of its own, judged by the file it leaves."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3_convert.errors import ConversionError, ModelFileError
from sa3_convert.mnn.compatibility import MnnVersion, check_reader
from sa3_convert.mnn.file.audit import audit
from sa3_convert.mnn.file.contents import ModelStorage
from sa3_convert.mnn.file.flatbuffer import WEIGHTS, weight_path
from sa3_convert.mnn.file.storage import content_digest, read_storage
from sa3_convert.mnn.isolated import TIMEOUT_SECONDS, WORKER, last_lines, run_worker
from sa3_convert.mnn.layer_rules import scheme_flags
from sa3_convert.mnn.onnx_input import OnnxInput, Ports, read_onnx_input
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.system.files import atomic_pair

EXTERNAL_FROM = 256 << 20
"""Bytes of float weights from which they stand beside a model, in `.weight`: MNN reads those one layer at a time, while
it keeps a model's own file beside what it makes of it. That halves the memory of a model with quantised weights; its
outputs stay the same bit for bit."""
_UUID_LENGTH = 36
_COMMON_FLAGS = (
    "--bizCode",
    "sa3",
    # Level 2 drops the guard for negative Gather indices.
    "--optimizeLevel",
    "1",
    # Otherwise exact GELU becomes the tanh form.
    "--useGeluApproximation",
    "0",
)


@dataclass(frozen=True, slots=True)
class Converter:
    """How the converter is started."""

    command: Sequence[str] = WORKER
    timeout: float = TIMEOUT_SECONDS

    def run(self, flags: Sequence[str], folder: Path) -> str:
        """Convert with `folder`, which must be this call's own, as working directory; return what was printed."""
        return run_worker(["convert", *flags, *_COMMON_FLAGS], folder, timeout=self.timeout, command=self.command)

    def ports(self, model: Path, folder: Path) -> Ports:
        """Load a `.mnn` file in a process of its own, which a damaged one may kill."""
        report = folder / "ports.json"
        report.unlink(missing_ok=True)
        run_worker(["ports", str(model), str(report)], folder, timeout=self.timeout, command=self.command)
        try:
            found = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(f"MNN's loader left no report on {model.name} ({error}).") from None
        if "error" in found:
            raise ConversionError(f"The converted file does not load: {found['error']}")
        inputs = {name: (dtype, tuple(shape)) for name, (dtype, shape) in found["inputs"].items()}
        return Ports(inputs, frozenset(found["outputs"]))


DEFAULT_CONVERTER = Converter()


def mnn_from_onnx(
    onnx_path: Path,
    mnn_path: Path,
    recipe: ComponentRecipe,
    *,
    target_mnn: MnnVersion | None = None,
    converter: Converter = DEFAULT_CONVERTER,
    check: Callable[[Path], None] = lambda _: None,
) -> ModelStorage:
    """Convert one ONNX file and audit the result; the same input, recipe and version of MNN give the same bytes.

    With integer weights and `floats: fp16` it takes two passes, because `--fp16` cancels the quantisation when both are
    asked for at once. From `EXTERNAL_FROM` on, weights are kept in `<mnn_path>.weight`; the two files belong together.

    Args:
        onnx_path: the graph, its weights as float32 external data or inside. Embedding quantisation and rounding are
            passes on the graph, done before.
        mnn_path: the result. A file of that name stays untouched unless everything went well.
        recipe: how weights and floats are stored.
        target_mnn: the oldest MNN that has to read the result; None does not care.
        converter: how the converter is started.
        check: raises if the finished file must not take its name.

    Returns:
        What the file holds.

    Raises:
        ConversionError: anything went wrong (the message holds the converter's last lines), or the file does not hold
            what the recipe asks for (the message names the layer), or the target cannot read it.

    """
    # Of a link, the weights stand beside what it leads to.
    source = read_onnx_input(onnx_path.resolve())
    with _made(mnn_path.absolute(), source.bytes) as made:
        folder = made.parent
        last = ("--saveExternalData",) if source.bytes >= EXTERNAL_FROM else ()
        if recipe.weights is not None and recipe.floats == "fp16":
            quantised = folder / f"quantised-{made.name}"
            _first_pass(source, quantised, recipe, converter, folder)
            output = _fp16_pass(quantised, made, converter, folder, last)
        else:
            output = _first_pass(source, made, recipe, converter, folder, last)
        _accept(made, source.ports, output, converter, folder)
        try:
            storage = read_storage(made)
        except ModelFileError as error:
            raise ConversionError(f"MNN's converter wrote a damaged file: {error}") from None
        audit(storage, recipe)
        if target_mnn is not None:
            check_reader(storage, target_mnn)
        check(made)
    return storage


def _first_pass(
    source: OnnxInput,
    made: Path,
    recipe: ComponentRecipe,
    converter: Converter,
    folder: Path,
    storing: Sequence[str] = (),
) -> str:
    scheme = recipe.weights
    if scheme is not None:
        stored = scheme_flags(scheme, source.outputs, folder)
    else:
        stored = ["--fp16"] if recipe.floats == "fp16" else []
    flags = ["-f", "ONNX", "--modelFile", str(source.path), "--MNNModel", str(made)]
    output = converter.run([*flags, *storing, *stored], folder)
    _check_written(made, output)
    return output


def _fp16_pass(source: Path, made: Path, converter: Converter, folder: Path, storing: Sequence[str] = ()) -> str:
    if weight_path(source).exists():
        raise ConversionError(
            "More than 2000 MB of float weights: MNN keeps them in a separate file, and its second pass, which "
            "`floats: fp16` beside quantised weights needs, leaves an unusable one. Use `floats: fp32`."
        )
    output = converter.run(
        ["-f", "MNN", "--modelFile", str(source), "--MNNModel", str(made), "--fp16", *storing], folder
    )
    _check_written(made, output)
    return output


def _check_written(made: Path, output: str) -> None:
    if not made.is_file():
        raise ConversionError(f"MNN's converter wrote no file.{last_lines(output)}")
    if made.stat().st_size == 0:
        raise ConversionError(f"MNN's converter wrote an empty file.{last_lines(output)}")


def _accept(made: Path, expected: Ports, output: str, converter: Converter, folder: Path) -> None:
    """Make the file's identity its content's, load it, and compare what goes in and out."""
    try:
        found = converter.ports(made, folder)
    except ConversionError as error:
        raise ConversionError(f"{error} The converter said:{last_lines(output)}") from None
    if difference := expected.difference(found):
        raise ConversionError(f"The converted file has another interface than the graph: {difference}.")
    set_content_uuid(made)


def set_content_uuid(path: Path) -> uuid.UUID:
    """Replace a `.mnn` file's random UUID, in place, by one made from all other bytes, and return it.

    Nothing else differs between two conversions of the same input, so equal conversions then give equal bytes.
    """
    try:
        extent = read_storage(path).identity
        identity = uuid.UUID(bytes=bytes.fromhex(content_digest(path))[:16], version=5)
    except ModelFileError as fault:
        raise ConversionError(f"MNN's converter left a damaged file: {fault}") from None
    if extent is None or extent.bytes != _UUID_LENGTH:
        raise ConversionError(f"{path.name} has no UUID: this version of MNN writes another format than 3.6.")
    with path.open("r+b") as stream:
        stream.seek(extent.offset)
        stream.write(str(identity).encode())
    return identity


@contextlib.contextmanager
def _made(target: Path, source_bytes: int) -> Iterator[Path]:
    """Yield a path in an empty folder beside the target, which is taken by what stands there after the block."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise ConversionError(f"{target.parent} cannot be made a folder to write into: {error}.") from None
    if free < source_bytes:
        raise ConversionError(
            f"{target.parent} has {free / 2**20:.0f} MiB of disk left; converting needs at least the "
            f"{source_bytes / 2**20:.0f} MiB that the converter's scratch file takes. Free some, or write elsewhere."
        )
    try:
        with atomic_pair(target, WEIGHTS) as made:
            yield made
    except OSError as error:
        raise ConversionError(f"{target} cannot be written: {error}.") from None

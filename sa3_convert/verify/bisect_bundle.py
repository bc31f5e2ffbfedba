"""Bisect a model of a bundle, at sampled inputs or at inputs from a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from sa3_convert.bundle.manifest import Bundle
from sa3_convert.checkpoint.layout import CheckpointLayout
from sa3_convert.components import Component, Length, contract
from sa3_convert.errors import InputError
from sa3_convert.mnn.backends import Backend, require_backend
from sa3_convert.session import Arrays
from sa3_convert.untrusted import open_regular
from sa3_convert.verify.against import Against, Runtime, bisect_against
from sa3_convert.verify.bisect import bisect
from sa3_convert.verify.bisect_result import BisectResult
from sa3_convert.verify.inputs import sample_inputs

DEFAULT_LATENTS: Mapping[Component, int] = {
    Component.TEXT_ENCODER: 1,
    Component.NUMBER_CONDITIONER: 1,
    Component.DIT: 108,
    Component.DECODER: 16,
    Component.ENCODER: 16,
}


def bisect_bundle(
    bundle: Bundle,
    component: Component,
    *,
    seed: int = 0,
    latents: int | None = None,
    feeds: Arrays | None = None,
    threads: int | None = None,
    backend: Backend = "cpu",
) -> BisectResult:
    """Compare the intermediate tensors of a bundle's model with those of its reference.

    Args:
        bundle: its files are checked against its manifest first.
        component: which model.
        seed: of the sampled inputs; the cases of a verification name theirs.
        latents: T of the sampled inputs; None is a length that takes seconds.
        feeds: inputs to use instead of sampled ones; see `read_feeds`.
        threads: of either engine; None is one per processor.
        backend: what MNN runs the model on.

    Raises:
        BackendError: the installed MNN does not have the backend.
        BundleError: the bundle lacks the component, or a file is not what the manifest says.
        ModelFileError: a file cannot be loaded or run.
        VerificationError: the two have no tensor in common.

    """
    require_backend(backend)
    reference, target = bundle.checked(component, "onnx"), bundle.checked(component, "mnn")
    given = _sampled(bundle, component, seed, latents) if feeds is None else feeds
    found = bisect(reference.path, target.path, given, threads=threads, backend=backend)
    reference.require_unchanged()
    target.require_unchanged()
    return found


def bisect_bundle_against(
    bundle: Bundle,
    component: Component,
    target: Runtime,
    reference: Runtime,
    *,
    seed: int = 0,
    latents: int | None = None,
    feeds: Arrays | None = None,
) -> Against:
    """Compare the tensors of a bundle's model between two ways to run it; see `bisect_bundle` and `bisect_against`."""
    file = bundle.checked(component, "mnn")
    found = bisect_against(file.path, feeds or _sampled(bundle, component, seed, latents), target, reference)
    file.require_unchanged()
    return found


def _sampled(bundle: Bundle, component: Component, seed: int, latents: int | None) -> Arrays:
    return sample_inputs(component, bundle.layout, seed=seed, latents=latents or DEFAULT_LATENTS[component]).feeds


_LARGEST = 2 << 30
"""Bytes of inputs; the longest audio that a model takes has a tenth of them."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read a `.npz` file.

    Raises:
        InputError: it is missing, damaged or too large.

    """
    try:
        with open_regular(path) as stream, ZipFile(stream) as members:
            if sum(member.file_size for member in members.infolist()) > _LARGEST:
                raise InputError(f"{path} holds more than {_LARGEST >> 20} MiB.")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except Exception as error:  # what zipfile, zlib and numpy raise of damaged files has no type in common
        raise InputError(f"{path} is no .npz file of inputs: {error}") from None


def read_feeds(path: Path, component: Component, layout: CheckpointLayout) -> dict[str, NDArray[Any]]:
    """Read a component's inputs from a `.npz` file and hold them to the contract.

    Raises:
        InputError: the file is missing or damaged, an input is missing or unknown, or is of another dtype or shape.

    """
    feeds = read_arrays(path)
    ports = contract(component, layout).inputs
    wanted = {port.name for port in ports}
    if feeds.keys() != wanted:
        raise InputError(f"{path} holds {', '.join(feeds) or 'nothing'}; {component.value} takes {', '.join(wanted)}.")
    lengths: set[int] = set()
    for port in ports:
        array = feeds[port.name]
        fits = array.ndim == len(port.shape) and str(array.dtype) == port.dtype and np.isfinite(array).all()
        for size, dimension in zip(array.shape, port.shape, strict=False):
            if isinstance(dimension, Length):
                fits &= size > 0 and size % dimension.factor == 0
                lengths.add(size // dimension.factor)
            else:
                fits &= size == dimension
        if not fits or len(lengths) > 1:
            shape = [f"{d.factor}·T" if isinstance(d, Length) else d for d in port.shape]
            raise InputError(
                f"{path}: {port.name} is {array.dtype} {list(array.shape)}; {component.value} takes {port.dtype} "
                f"{shape}, finite, with one T for all inputs."
            )
    return feeds

"""Weights in safetensors, one file or shards: what they hold, held to what they should hold, and bytes in pieces."""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from sa3_convert.checkpoint.json_file import listed, read_json, shown
from sa3_convert.checkpoint.tensors import Shape, StoredType, TensorSpec, is_leftover
from sa3_convert.errors import CheckpointError
from sa3_convert.system import untrusted

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS: Final = "model.safetensors"
INDEX: Final = f"{WEIGHTS}.index.json"

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}\.safetensors")
_MOST: Final = 1000
"""Shards; the largest published models have some hundred."""
_PIECE = 1 << 23
_SHOWN = 5
_SUPPORTED = ", ".join(get_args(StoredType))
_LONGEST_HEADER = 16 << 20
"""Bytes; that of the largest published file has a hundredth of it."""
_LFS_POINTER = b"version https://git-lfs"
_STORED_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
# All exponent bits set: an infinity or a NaN, whatever the mantissa.
_EXPONENT: Mapping[str, int] = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_WRITTEN_AT_ONCE: Final = 1 << 22


class Scratch:
    """Room in a folder, or where the system has its temporary files, for float32 tensors that stand in no file so."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as its tensors

    def kept(self, tensor: "Tensor") -> "Tensor":
        """Return a mapped tensor of the same values; half precision is widened, which is exact, piece by piece."""
        import torch

        if not tensor.numel():
            return tensor.to(torch.float32)
        offset = self._file.seek(0, 2)
        flat = tensor.contiguous().view(-1)
        for start in range(0, flat.numel(), _WRITTEN_AT_ONCE):
            self._file.write(flat[start : start + _WRITTEN_AT_ONCE].to(torch.float32).numpy().data)
        self._file.flush()
        mapped = np.memmap(self._file, np.float32, "c", offset, tuple(tensor.shape))
        return torch.from_numpy(mapped)


def read_index(index: Path) -> dict[str, str]:
    """Return the name of the file that holds a tensor, by tensor."""
    content = read_json(index)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: weight_map is {shown(placed)}, expected an object, tensor → file.")
    for name in placed.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index} names {shown(name)} as a file of weights; only .safetensors files beside it are read."
            )
    if len(set(placed.values())) > _MOST:
        raise CheckpointError(f"{index} names more than {_MOST} files.")
    return placed


def shard_names(index: Path) -> tuple[str, ...]:
    """Return the files beside an index that it needs, sorted; `checkpoint fetch` asks for these."""
    return tuple(sorted(set(read_index(index).values())))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where and how a tensor stands in its file."""

    file: Path
    stored: str
    shape: Shape
    offset: int
    nbytes: int


def refuse_pointer(path: Path) -> None:
    """Refuse a git-lfs pointer, which stands where a file's content was not downloaded."""
    if not path.is_file():
        raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}.")
    try:
        with untrusted.open_regular(path) as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` in {path.parent}, "
            "or download the checkpoint with `sa3-convert checkpoint fetch`."
        )


class TensorFile:
    """An open safetensors file whose header is sound, or all that an index names, read as one.

    `entries` has every tensor by name, of whatever type.
    """

    def __init__(self, path: Path, *, is_index: bool = False) -> None:
        """Open a file; one that is missing, a git-lfs pointer, truncated or something else is refused."""
        refuse_pointer(path)
        self.path = path
        self.entries, self.metadata = (_sharded(path), {}) if is_index else _read_header(path)

    def require(self, expected: Mapping[str, TensorSpec], *, within: str = "") -> None:
        """Hold the tensors whose names start with `within` to `expected`; what training leaves behind may be there."""
        found = {name: entry for name, entry in self.entries.items() if name.startswith(within)}
        missing = sorted(expected.keys() - found.keys())
        unknown = [name for name in sorted(found.keys() - expected.keys()) if not is_leftover(name, found[name].stored)]
        problems = [f"{name} is missing" for name in missing]
        problems += [f"{name} is not known" for name in _grouped(unknown, expected)]
        for name in sorted(expected.keys() & found.keys()):
            wanted, shape = expected[name].shape, found[name].shape
            if found[name].stored not in _STORED_BYTES:
                problems.append(f"{name} is stored as {found[name].stored}; only {_SUPPORTED} are supported")
            elif wanted != shape:
                problems.append(f"{name} has shape {list(shape)}, expected {list(wanted)}")
        if problems:
            raise CheckpointError(
                f"{self.path} does not fit its configuration: {listed(problems)}. "
                f"{self._advice(expected, missing, unknown)}"
            )

    def _advice(self, expected: Mapping[str, TensorSpec], missing: list[str], unknown: list[str]) -> str:
        wrapped = [name for name in self.entries for lost in missing[:1] if name.endswith(f".{lost}")]
        if wrapped:
            prefix = wrapped[0].removesuffix(missing[0])
            there = sum(f"{prefix}{name}" in self.entries for name in expected)
            return (
                f"{there} of the {len(expected)} tensors stand there with {prefix!r} before their names. If this is "
                "the checkpoint of a training, export the model from it (stable-audio-tools' unwrap_model.py takes the "
                "averaged weights); otherwise strip that prefix from the names."
            )
        if unknown and not missing:
            return (
                "If what is not known was left behind by training, strip it from the file (load_file and save_file of "
                "safetensors); otherwise the model is another than model_config.json says."
            )
        return "Are the files of one checkpoint, and complete?"

    def tensors(self, names: Mapping[str, str], scratch: Scratch | None = None) -> "dict[str, Tensor]":
        """Return tensors as float32, under the values of `names`: views of the file, or widened in `scratch`."""
        import torch
        from safetensors import safe_open

        found = {}
        for path in dict.fromkeys(self.entries[name].file for name in names):
            with safe_open(path, "pt") as file:
                for name in (name for name in names if self.entries[name].file == path):
                    tensor = file.get_tensor(name)
                    if scratch is not None and tensor.dtype != torch.float32:
                        found[name] = scratch.kept(tensor)
                    else:
                        found[name] = tensor.to(torch.float32)
        return {to: found[name] for name, to in names.items()}

    def array(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as float32, without torch; BF16 and F16 are widened, which is exact."""
        entry = self.entries[name]
        raw = np.frombuffer(b"".join(self._pieces(name)), {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.stored])
        wide = (raw.astype(np.uint32) << 16).view(np.float32) if entry.stored == "BF16" else raw.astype(np.float32)
        return wide.reshape(entry.shape)

    def _pieces(self, name: str) -> Iterator[bytes]:
        entry = self.entries[name]
        left = entry.nbytes
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            while left:
                piece = stream.read(min(left, _PIECE))
                if not piece:
                    raise CheckpointError(f"{entry.file} has become shorter while it was read.")
                left -= len(piece)
                yield piece

    def sha256(self, name: str) -> str:
        """Return the hex SHA-256 of a tensor's bytes as stored."""
        digest = hashlib.sha256()
        for piece in self._pieces(name):
            digest.update(piece)
        return digest.hexdigest()

    def require_finite(self, name: str) -> None:
        """Refuse a tensor that is no weight or holds an infinity or a NaN, whose index the message gives."""
        entry = self.entries[name]
        if entry.stored not in _STORED_BYTES:
            raise CheckpointError(f"{entry.file}: {name} is stored as {entry.stored}; only {_SUPPORTED} are supported.")
        exponent = _EXPONENT[entry.stored]
        start = 0
        for piece in self._pieces(name):
            bits: NDArray[np.unsignedinteger] = np.frombuffer(piece, f"<u{_STORED_BYTES[entry.stored]}")
            bad = (bits & exponent) == exponent
            if bad.any():
                index = [int(i) for i in np.unravel_index(start + int(bad.argmax()), entry.shape)]
                raise CheckpointError(
                    f"{entry.file}: {name}{index} is not a finite number. The file is damaged or the training "
                    "diverged; download it again or take another checkpoint."
                )
            start += bits.size


def open_weights(folder: Path) -> TensorFile:
    """Open a folder's weights: `model.safetensors`, or shards with their index where it is not there."""
    whole, index = folder / WEIGHTS, folder / INDEX
    if not whole.exists() and index.exists():
        return TensorFile(index, is_index=True)
    if not whole.exists() and any(folder.glob("model-*-of-*.safetensors")):
        raise CheckpointError(f"{folder} holds shards of {WEIGHTS}, but their index {INDEX} is missing. Download it.")
    return TensorFile(whole)


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with untrusted.open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header claims {length} bytes")
            text = stream.read(length)
        # Holds names, types, shapes and offsets to one another and to the file's length.
        with safe_open(path, "np"):
            header: dict[str, Any] = untrusted.parse_json(text.decode())
        metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries = {name: _entry(path, 8 + length, value) for name, value in header.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged or no safetensors file: {error}. "
            "Download it again."
        ) from None
    return dict(sorted(entries.items(), key=lambda item: item[1].offset)), metadata


def _entry(path: Path, start: int, value: Mapping[str, Any]) -> StoredTensor:
    first, end = value["data_offsets"]
    return StoredTensor(path, value["dtype"], tuple(value["shape"]), start + first, end - first)


def _sharded(index: Path) -> dict[str, StoredTensor]:
    """Return the tensors of all files that an index names, which must be those that it names, each in its file."""
    placed = read_index(index)
    paths = {name: index.with_name(name) for name in sorted(set(placed.values()))}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        raise CheckpointError(
            f"{index} names {', '.join(missing[:_SHOWN])}, missing beside it. Download what is missing."
        )
    entries: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for path in paths.values():
        refuse_pointer(path)
        for name, entry in _read_header(path)[0].items():
            if name in entries:
                problems.append(f"{shown(name)} stands in {entries[name].file.name} and in {path.name}")
            elif placed.get(name) != path.name:
                problems.append(f"{shown(name)} stands in {path.name}, the index says {shown(placed.get(name))}")
            entries[name] = entry
        if problems:
            break
    problems = problems or [f"{shown(name)} is not in {placed[name]}" for name in placed if name not in entries]
    if problems:
        raise CheckpointError(
            f"{index} and its files contradict one another: {listed(problems)}. "
            "Are they of one checkpoint, and complete? Download them again."
        )
    return entries


def _grouped(unknown: list[str], expected: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yield names; those that begin with a word that no expected name begins with as one."""
    roots = {name.partition(".")[0] for name in expected}
    strange = Counter(root for name in unknown if (root := name.partition(".")[0]) not in roots)
    yield from (f"{root}… ({count} tensors)" if count > 1 else root for root, count in sorted(strange.items()))
    yield from (name for name in unknown if name.partition(".")[0] in roots)

"""What tasks of the laboratory share wherever they run: the checkpoint, and where results are found and left.

Workers without a common folder share results by a store: an object store, or anything else that fsspec reaches. It
keeps what the stage cache keeps, under the same names. An object store has no renaming: the entry, which lists the
files with their hashes, is written last, so a result is whole or not there. What is brought is held to its hashes by
the cache that it comes into, and counts as absent where it differs.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sa3_convert.convert.cache import ENTRY, MAX_ENTRY_BYTES, CachedResult, Notes, StageCache
from sa3_convert.errors import InputError, UsageError
from sa3_convert.system.checked_files import FileState
from sa3_convert.system.files import partial_folder, sha256_file, take_name
from sa3_convert.system.untrusted import parse_json

if TYPE_CHECKING:
    from sa3_convert.checkpoint.reader import Checkpoint

N = TypeVar("N", bound=Notes)
_LARGEST: Final = 64 << 30
"""Bytes of a file that is brought."""


@dataclass(frozen=True, slots=True)
class Common:
    """What tasks share, wherever they run."""

    folder: Path
    """The checkpoint, which every worker sees here."""
    cache: Path
    """A folder that every worker sees, or one of each worker's own, beside a store."""
    loras: tuple[str, ...] = ()
    store: str = ""
    """The address of what keeps results for all workers; none where they share the cache."""
    threads: int | None = None

    @classmethod
    def of(cls, checkpoint: "Checkpoint", cache: Path, loras: Sequence[str] | None, **how: Any) -> "Common":
        """Return the same for processes that may stand in other folders."""
        paths = tuple(str(Path(text).expanduser().absolute()) for text in loras or ())
        return cls(checkpoint.folder.absolute(), cache.absolute(), paths, **how)

    def open(self) -> "Checkpoint":
        """Open the checkpoint, or give what was opened before, if its files are still the same."""
        return _opened(self.folder, self.loras, _states(self.folder, self.loras))

    def has(self, stage: str, key: str, notes: type[N]) -> bool:
        """Tell whether the cache has a result whole, or the store names it; nothing is brought."""
        if StageCache(self.cache).find(stage, key, notes) is not None:
            return True
        return bool(self.store) and Store(self.store).lists(stage, key)

    def find(self, stage: str, key: str, notes: type[N]) -> CachedResult[N] | None:
        """Return a result that the cache has whole, or the store."""
        stages = StageCache(self.cache)
        found = stages.find(stage, key, notes)
        if found is None and self.store:
            Store(self.store).bring(stage, key, stages)
            found = stages.find(stage, key, notes)
        return found

    def found_or_made(
        self, stage: str, key: str, notes: type[N], make: "Callable[[StageCache], CachedResult[N]]"
    ) -> CachedResult[N]:
        """Return a result, made if nobody has it, and leave it for all workers."""
        stages = StageCache(self.cache)
        known = self.find(stage, key, notes)
        found = known or make(stages)
        if self.store:
            # What the store had and could not be used was damaged there.
            Store(self.store).take(stage, key, stages, again=known is None)
        return found


@lru_cache(maxsize=1)
def _opened(folder: Path, loras: tuple[str, ...], _: frozenset[object]) -> "Checkpoint":
    from sa3_convert.checkpoint.lora_file import LoraRequest
    from sa3_convert.checkpoint.reader import Checkpoint

    return Checkpoint.open(folder).with_loras([LoraRequest.parse(text) for text in loras])


def tokenizer_of(checkpoint: "Checkpoint") -> str:
    """Return the SHA-256 of a checkpoint's tokenizer, for keys: it says what a prompt is, and is no tensor."""
    from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER
    from sa3_convert.checkpoint.reader import TOKENIZER

    file = checkpoint.folder / TEXT_ENCODER_FOLDER / TOKENIZER
    return sha256_file(file) if checkpoint.text_encoder is not None else ""


def _states(folder: Path, loras: tuple[str, ...]) -> frozenset[object]:
    """Return which bytes a checkpoint's files are: a worker may live for days, others may take their names."""
    from sa3_convert.checkpoint.config import TEXT_ENCODER_FOLDER
    from sa3_convert.checkpoint.lora_file import LoraRequest
    from sa3_convert.checkpoint.lora_names import lora_state

    own = (file for place in (folder, folder / TEXT_ENCODER_FOLDER) for file in place.glob("*"))
    files = [file for file in own if file.suffix in (".json", ".safetensors") and file.is_file()]
    adapters = [LoraRequest.parse(text).path for text in loras]
    return frozenset([*((file, FileState.at(file)) for file in files), *((one, lora_state(one)) for one in adapters)])


class Store:
    """Results by stage and key at an address.

    Args:
        address: as fsspec has them: `s3://bucket/folder`, `gs://…`, `file:///…`.

    Raises:
        UsageError: fsspec, or what it needs for this kind of address, does not know it.

    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        try:
            self._files, self._root = url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise UsageError(f"--store {address}: {error}") from None
        self.address = self._root if isinstance(self._files, LocalFileSystem) else address
        """The same for processes that may stand in other folders."""

    def bring(self, stage: str, key: str, cache: StageCache) -> None:
        """Bring a result into a cache, if the store has it whole."""
        place = cache.root / stage / key
        with contextlib.suppress(OSError, ValueError), partial_folder(place) as folder, _of_driver():
            (folder / ENTRY).write_bytes(self._read(stage, key))
            listed = parse_json((folder / ENTRY).read_text("utf-8"))
            for name in _names(listed):
                where = self._where(stage, key, name)
                if self._files.size(where) > _LARGEST:
                    return
                self._files.get_file(where, str(folder / name))
            take_name(folder, place)

    def lists(self, stage: str, key: str) -> bool:
        """Tell whether a result's entry is there, which is written last."""
        with contextlib.suppress(OSError, ValueError), _of_driver():
            return bool(self._files.exists(self._where(stage, key, ENTRY)))
        return False

    def take(self, stage: str, key: str, cache: StageCache, *, again: bool = False) -> None:
        """Keep a result that a cache has, unless it is there with files of the same sizes, or `again` is said.

        Raises:
            InputError: the store does not take it.

        """
        place = cache.root / stage / key
        files = sorted(place.iterdir(), key=lambda file: file.name == ENTRY)
        try:
            with _of_driver():
                if not again and self.lists(stage, key) and all(self._holds(stage, key, file) for file in files[:-1]):
                    return
                self._files.makedirs(f"{self._root}/{stage}/{key}", exist_ok=True)
                for file in files:
                    self._files.put_file(str(file), self._where(stage, key, file.name))
        except (OSError, ValueError) as error:
            raise InputError(f"The store does not take the result of {stage}: {error}") from None

    def _holds(self, stage: str, key: str, file: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(self._files.size(self._where(stage, key, file.name)) == file.stat().st_size)
        return False

    def _read(self, stage: str, key: str) -> bytes:
        with self._files.open(self._where(stage, key, ENTRY), "rb") as stream:
            return bytes(stream.read(MAX_ENTRY_BYTES))

    def _where(self, stage: str, key: str, name: str) -> str:
        return f"{self._root}/{stage}/{key}/{name}"


@contextlib.contextmanager
def _of_driver() -> Iterator[None]:
    """Raise what a driver has of errors of its own, as for missing credentials, as an error of the system."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _names(entry: Any) -> list[str]:
    """Return the names of a result's files; none leads out of its folder."""
    names = list(entry["files"]) if isinstance(entry, dict) and isinstance(entry.get("files"), dict) else [""]
    if any(name in ("", ".", "..", ENTRY) or name != Path(name).name or "\\" in name for name in names):
        raise ValueError(f"{json.dumps(names)[:200]} are no names of files in one folder")
    return names

"""Results of stages by fingerprint: a folder per result, complete or absent.

An entry is built under a temporary name and takes its place by one rename, so a process that is killed leaves at most
a folder that nobody reads and that the next run removes. What an entry says is held to its own hash, which also knows
the place where it belongs, and its files to theirs, whenever it is used; anything else counts as absent.
"""

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue

from sa3_convert.bundle.manifest import Fidelity
from sa3_convert.errors import ConversionError
from sa3_convert.mnn.compatibility import MnnVersion
from sa3_convert.system.files import partial_folder, sha256_file, sweep, take_name
from sa3_convert.system.sealed import fingerprint

if TYPE_CHECKING:
    from sa3_convert.rounding.compensated import RoundedLinear

PLANNED: Final = "weights.safetensors"
"""What rounding leaves, of a layer or in all."""
ENTRY: Final = "entry.json"
UNFINISHED: Final = "unfinished"
"""Where parts of a result are until it is whole, each key in a folder of its own."""
MAX_ENTRY_BYTES: Final = 16 * 2**20
"""Of `entry.json`, which has some kilobytes."""


def cache_beside(bundle: Path) -> Path:
    """Return where stages are kept unless told otherwise: bundles in one folder share them."""
    return bundle.absolute().parent / ".sa3-convert-cache"


class Notes(BaseModel):
    """What is noted about a result; a stage that has more to tell adds to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    detail: str = ""
    """A few words for the user."""
    log: tuple[str, ...] = ()
    """What MNN, its converter and others said meanwhile."""


class ModelNotes(Notes):
    """Of a file that comes into a bundle. What is called as in `Artifact` is what the manifest says of it."""

    precision: str


class RoundNotes(Notes):
    """How much each linear won."""

    gains_db: dict[str, float]


class MnnNotes(ModelNotes):
    """What was done, and what the file holds."""

    storage: dict[str, Any]
    passes: dict[str, int]
    target_mnn: MnnVersion


class FidelityNotes(Notes):
    """How close a model is to its reference, and how close it has to be."""

    fidelity: Fidelity
    floor_db: float
    half_db: float | None = None


class JudgedModelNotes(ModelNotes, FidelityNotes):
    """Of a file that is judged by the stage that makes it."""


class SlotNotes(ModelNotes):
    """Of a model with slots for adapters."""

    rank: int


class JudgedSlotNotes(SlotNotes, JudgedModelNotes):
    """Of one that is judged by the stage that makes it."""

    storage: dict[str, Any] | None = None
    target_mnn: MnnVersion | None = None


N = TypeVar("N", bound=Notes)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    files: dict[str, str]
    notes: dict[str, JsonValue]
    sha256: str
    """Of everything else and of the place where it belongs."""


@dataclass(frozen=True, slots=True)
class CachedResult(Generic[N]):
    """One stage's result: its files and what was noted about them."""

    folder: Path
    files: dict[str, str]
    """SHA-256 by file name."""
    notes: N

    def file(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.folder / name


class StageCache:
    """A folder of stage results."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, stage: str, key: str, notes: type[N]) -> CachedResult[N] | None:
        """Return the whole, undamaged result of a stage with its kind of notes, or None; nothing outside it is read."""
        folder = self.root / stage / key
        try:
            listed = {file.name: file for file in folder.iterdir()}
            entry_file = listed.pop(ENTRY)
            if folder.is_symlink() or not all(_is_regular(file) for file in (entry_file, *listed.values())):
                return None
            with entry_file.open("rb") as stream:
                entry = _Entry.model_validate_json(stream.read(MAX_ENTRY_BYTES))
            if entry.sha256 != _seal(stage, key, entry.files, entry.notes) or entry.files.keys() != listed.keys():
                return None
            found = notes.model_validate(entry.notes)
            whole = all(sha256_file(listed[name]) == digest for name, digest in entry.files.items())
        except (OSError, KeyError, ValueError, RecursionError):
            return None
        return CachedResult(folder, entry.files, found) if whole else None

    def make(self, stage: str, key: str, make: Callable[[Path], N], *, replace: bool = False) -> CachedResult[N]:
        """Make a stage's result in an empty folder and keep it; with `replace`, in the place of a whole one too."""
        place = self.root / stage / key
        with partial_folder(place) as temporary:
            made = make(temporary)
            files = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
            notes = made.model_dump(mode="json")
            entry = {"files": files, "notes": notes, "sha256": _seal(stage, key, files, notes)}
            (temporary / ENTRY).write_text(json.dumps(entry, indent=1, allow_nan=False), encoding="utf-8")
            try:
                take_name(temporary, place)
            except OSError:
                # Another process finished the same result first, by fingerprint as good; or it is a damaged one.
                if not replace and (found := self.find(stage, key, type(made))) is not None:
                    return found
                _replace(temporary, place)
            return CachedResult(place, files, made)

    def parts(self, key: str, tell: Callable[[int, int], None]) -> "Parts":
        """Return where a stage with this key keeps what it has finished of its result."""
        return Parts(StageCache(self.root / UNFINISHED), key, tell)

    def forget(self, key: str) -> None:
        """Remove the parts of a stage with this key."""
        shutil.rmtree(self.root / UNFINISHED / key, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what processes that are gone have left."""
        for folder in (*self.root.glob("*/"), *self.root.glob(f"{UNFINISHED}/*/")):
            sweep(folder)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a stage has finished of a result that takes long: an interrupted one goes on from there."""

    cache: StageCache
    key: str
    """The stage's own: what depends on anything else is never found."""
    tell: Callable[[int, int], None]
    """Told how many parts there are, and of how many."""

    def linears(self, layer: str, make: "Callable[[], list[RoundedLinear]]") -> "list[RoundedLinear]":
        """Return the linears of a layer, as they were kept, whole and undamaged, or made."""
        from sa3_convert.rounding.compensated import RoundedLinear
        from sa3_convert.rounding.network import PlannedWeights

        def write(folder: Path) -> RoundNotes:
            made = make()
            PlannedWeights.write(folder / PLANNED, made)
            return RoundNotes(gains_db={linear.name: linear.gain_db for linear in made})

        part = fingerprint(layer=layer)
        kept = self.cache.find(self.key, part, RoundNotes) or self.cache.make(self.key, part, write)
        weights = PlannedWeights(kept.file(PLANNED))
        return [RoundedLinear(name, weights.read(name), gain) for name, gain in kept.notes.gains_db.items()]


def _seal(stage: str, key: str, files: dict[str, str], notes: dict[str, Any]) -> str:
    return fingerprint(stage=stage, key=key, files=files, notes=notes)


def _is_regular(file: Path) -> bool:
    return stat.S_ISREG(file.lstat().st_mode)


def _replace(folder: Path, entry: Path) -> None:
    """Give a folder the name of a result, or of whatever else has it; what a link leads to stays."""
    try:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        take_name(folder, entry)
    except OSError as error:
        raise ConversionError(
            f"{entry} cannot be replaced: {error.strerror}. Remove it, or give another --cache."
        ) from None

"""One tree of errors, one exit code per meaning.

Everything that a user can cause or mend is a `Sa3Error` whose message says what is wrong, where, and what to do.
Only `sa3_convert.cli.main` prints it and turns it into the exit code. Any other exception is a bug (exit 70).
"""

import errno
import re
from collections.abc import Mapping
from string import Formatter
from types import MappingProxyType
from typing import Final


class Sa3Error(Exception):
    """Base of all errors that are the user's to mend; `exit_code` is part of the command line's contract."""

    exit_code = 70


class UsageError(Sa3Error):
    """The command line asks for something that does not make sense."""

    exit_code = 2


class SettingError(UsageError):
    """A setting of a generation cannot be.

    Args:
        sentence: what is wrong, as a format of `values`; settings are named in braces: "{seed} is {0}, not …".
        values: what the sentence's numbers stand for.

    """

    def __init__(self, sentence: str, *values: object) -> None:
        super().__init__(sentence, *values)

    def __str__(self) -> str:
        return self.told()

    def told(self, called: Mapping[str, str] = MappingProxyType({})) -> str:
        """Return the sentence with settings named as whoever gave them calls them: `--init-audio`, `init_audio`."""
        sentence, *values = self.args
        names = {name for _, name, _, _ in Formatter().parse(sentence) if name and not name.isdigit()}
        return str(sentence.format(*values, **{name: called.get(name, name) for name in names}))


class InputError(Sa3Error):
    """A checkpoint, recipe, audio file, LoRA or bundle that was given cannot be used as it is."""

    exit_code = 3


class HubError(InputError):
    """The hub cannot be reached or refuses, or what it sends is not what it names."""


class CheckpointError(InputError):
    """The checkpoint is incomplete, damaged or of an unsupported kind."""


class LoraError(InputError):
    """A LoRA file is damaged, not of Stable Audio 3, or does not fit the checkpoint."""


class RecipeError(InputError):
    """The recipe is not valid or asks for what this component cannot have."""


class BundleError(InputError):
    """The bundle is incomplete or not what its manifest says."""


class AudioError(InputError):
    """An audio file cannot be read or is not usable as input."""


class ModelFileError(InputError):
    """A `.mnn` or `.onnx` file is damaged or is not such a file."""


class ConversionError(Sa3Error):
    """Export, a graph pass, MNN's converter or the audit of its result failed."""

    exit_code = 4


class VerificationError(Sa3Error):
    """A converted model is not close enough to its reference."""

    exit_code = 5


class DriftError(Sa3Error):
    """Figures have moved away from the baseline by more than their rule allows."""

    exit_code = 6


class BackendError(Sa3Error):
    """The backend or engine that was asked for is not there."""

    exit_code = 7


class OutputRejectedError(Sa3Error):
    """Generated audio failed its checks: non-finite, silent, constant, or of the wrong length."""

    exit_code = 8


_OUT_OF_MEMORY: Final = re.compile(r"(?i)(can't|cannot|failed to|unable to) allocate|bad.?alloc")
"""How native libraries say it: torch and ONNX Runtime have no exception type for it."""


def told_by_system(error: Exception) -> Sa3Error | None:
    """Return what an error of the system is to a user: no memory, no room, a refusal; None if it is none of these."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return ConversionError(
            "Out of memory. Convert fewer components at a time (--component), or on a larger machine."
        )
    if isinstance(error, OSError):
        what = "The disk is full" if error.errno == errno.ENOSPC else "The system refused"
        return InputError(f"{what}: {error}. Nothing half-written was left behind.")
    return None

"""What other commands ask of a diagnosis, cheaply: one JSON file is read, nothing is run."""

from collections.abc import Collection

from sa3_convert.components import Component
from sa3_convert.doctor.results import ProbeResult, setting_name
from sa3_convert.doctor.saved import saved
from sa3_convert.errors import ConversionError
from sa3_convert.fingerprint import version_of

CONVERSION_SETTING = setting_name("high", "normal")
"""How a conversion runs what it made."""


def check_conversion(components: Collection[Component]) -> str | None:
    """Refuse to convert what the installed MNN is known to compute wrong here.

    Returns:
        A note for the user when nothing is known.

    Raises:
        ConversionError: a spelling that a component needs was probed and is not right on the CPU, where every
            converted model is verified.

    """
    diagnosis = saved("cpu")
    if diagnosis is None:
        return (
            f"MNN {version_of('MNN')} was not probed on this machine; `sa3-convert doctor` finds out, in seconds, "
            "what it gets wrong here."
        )
    for component in components:
        if failing := diagnosis.failing(component, CONVERSION_SETTING):
            raise ConversionError(
                f"{component.value}: the installed MNN {diagnosis.mnn} is wrong here on what it is made of: "
                f"{described(failing, CONVERSION_SETTING)}. Install the version in constraints.txt; if MNN was changed "
                "since, run `sa3-convert doctor` again."
            )
    return None


def described(results: Collection[ProbeResult], setting: str) -> str:
    """Return what failed, in a few words each."""
    words = []
    for result in results:
        answer = result.at(setting)
        ratio = "" if answer.db is None else f" ({answer.db:.0f} dB)"
        words.append(f"probe {result.probe} {answer.outcome}{ratio}")
    return ", ".join(words)

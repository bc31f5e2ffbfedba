"""The versions of everything that takes part in a conversion, for manifests and reports."""

import platform

import sa3_convert
from sa3_convert.fingerprint import version_of

TOOLS = ("MNN", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "tokenizers", "torch")


def tool_versions() -> dict[str, str]:
    """Return versions by name, this package and Python included; asks the installed metadata and imports nothing."""
    return {
        "sa3-convert": sa3_convert.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
    } | {name: version_of(name) for name in TOOLS}

"""A recipe's weight scheme as MNN's converter takes it: flags for all layers, and a file for single ones.

The converter names a layer after an output of the ONNX graph: its own, or that of a bias that follows, which MNN merges
into it. So the file has an entry for all outputs that a rule matches; those that no layer is named after are passed
over, and what became of each layer is audited.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from sa3_convert.errors import ConversionError
from sa3_convert.recipe import WeightScheme

LINEAR_SUFFIX: Final = "__matmul_converted"
"""What MNN appends to the ONNX output's name when it makes a 1×1 convolution of a MatMul or Gemm."""
BIAS_SUFFIX: Final = ".add"
"""What the exporter appends to a linear's name for the Add of its bias, which MNN merges into the convolution."""
LIFTED_SUFFIX: Final = ".lifted"
"""What the pass `lift_small_weights` appends to a layer's name; the layer's own name is then that of what follows."""

_NO_BLOCK: Final = -1
_SHOWN: Final = 5


def layer_name(operator: str) -> str:
    """Return the ONNX name of a layer, which rules match, for the name of its operator in a `.mnn` file."""
    return operator.removesuffix(LINEAR_SUFFIX).removesuffix(LIFTED_SUFFIX).removesuffix(BIAS_SUFFIX)


def scheme_flags(scheme: WeightScheme, outputs: Iterable[str], folder: Path) -> list[str]:
    """Return the converter's flags for a scheme; rules for single layers are written into `folder`.

    Args:
        scheme: what is asked for.
        outputs: names of all outputs of nodes of the ONNX graph.
        folder: where the converter finds what does not fit on a command line.

    """
    flags = [
        "--weightQuantBits",
        str(scheme.bits),
        # The help says that the default is symmetric; it is not. Words instead of 0 and 1 all mean symmetric.
        f"--weightQuantAsymmetric={0 if scheme.symmetric else 1}",
        "--weightQuantBlock",
        str(scheme.block_size or _NO_BLOCK),
        *(["--weightQuantScaleBit", "16"] if scheme.scales == "fp16" else []),
    ]
    ruled = [name for name in outputs if any(rule.matches(layer_name(name)) for rule in scheme.layers)]
    layers = [_layer(name + suffix, scheme) for name in ruled for suffix in ("", LINEAR_SUFFIX)]
    if layers:
        rules = folder / "layers.json"
        algorithm = {"type": "QUANTIZE", "quantParams": {"layer": layers}}
        rules.write_text(json.dumps({"version": "0.0.0", "forGuide": True, "algo": [algorithm]}), encoding="utf-8")
        flags += ["--compressionParamsFile", str(rules)]
    return flags


def _layer(operator: str, scheme: WeightScheme) -> dict[str, Any]:
    bits, block = scheme.for_layer(layer_name(operator))
    # No bits at all means floating point to the converter.
    weight = {"bits": bits or 0, "blockSize": block or _NO_BLOCK, "asymmetric": not scheme.symmetric}
    return {"opName": operator, "weight": [{"name": operator, **weight}]}


def check_rules(scheme: WeightScheme, names: Sequence[str]) -> None:
    """Raise if a rule matches no layer."""
    for index, rule in enumerate(scheme.layers):
        if not any(rule.matches(name) for name in names):
            shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
            raise ConversionError(
                f"weights.layers[{index}]: {rule.match!r} matches none of the {len(names)} quantised layers ({shown})."
            )

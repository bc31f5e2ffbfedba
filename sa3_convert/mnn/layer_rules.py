"""A recipe's weight scheme as MNN's converter takes it: flags for all layers, and a file for single ones.

When the file that `--compressionParamsFile` names does not exist, the converter writes one that lists every layer it
quantises. That list is the only sure one (a bias that follows a MatMul, for instance, gives the layer its name), so
rules are matched against it.
"""

import json
from collections.abc import Sequence
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


def scheme_flags(scheme: WeightScheme, layers: Path) -> list[str]:
    """Return the converter's flags for a scheme; `layers` is read if it exists, else the converter writes it."""
    return [
        "--weightQuantBits",
        str(scheme.bits),
        # The help says that the default is symmetric; it is not. Words instead of 0 and 1 all mean symmetric.
        f"--weightQuantAsymmetric={0 if scheme.symmetric else 1}",
        "--weightQuantBlock",
        str(scheme.block_size or _NO_BLOCK),
        "--compressionParamsFile",
        str(layers),
        *(["--weightQuantScaleBit", "16"] if scheme.scales == "fp16" else []),
    ]


def read_layers(path: Path) -> list[dict[str, Any]]:
    """Return the quantised layers as the converter listed them; a graph with nothing to quantise is an error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        layers = [layer for algorithm in found.get("algo", ()) for layer in algorithm["quantParams"].get("layer", ())]
        names = [layer["opName"] for layer in layers]
    except FileNotFoundError:
        names = []
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"MNN's converter listed the quantised layers in a form that is not known: {error!r}."
        ) from None
    if not names:
        raise ConversionError(
            "The recipe asks for quantised weights, but MNN finds no layer to quantise in this graph. "
            "Leave `weights` out of this component's recipe."
        )
    return layers


def apply_rules(scheme: WeightScheme, listed: Path, wanted: Path) -> None:
    """Write to `wanted` the converter's list of layers with each layer's bits and block as the rules say."""
    content = json.loads(listed.read_text(encoding="utf-8"))
    layers = read_layers(listed)
    check_rules(scheme, [layer_name(layer["opName"]) for layer in layers])
    for algorithm in content["algo"]:
        for layer in algorithm["quantParams"]["layer"]:
            bits, block = scheme.for_layer(layer_name(layer["opName"]))
            for weight in layer["weight"]:
                # No bits at all means floating point to the converter.
                weight.update(bits=bits or 0, blockSize=block or _NO_BLOCK, asymmetric=not scheme.symmetric)
    wanted.write_text(json.dumps(content), encoding="utf-8")


def check_rules(scheme: WeightScheme, names: Sequence[str]) -> None:
    """Raise if a rule matches no layer."""
    for index, rule in enumerate(scheme.layers):
        if not any(rule.matches(name) for name in names):
            shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
            raise ConversionError(
                f"weights.layers[{index}]: {rule.match!r} matches none of the {len(names)} quantised layers ({shown})."
            )

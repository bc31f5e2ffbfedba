"""Adapters of other trainers: how kohya's scripts, PEFT and Diffusers call layers, factors and settings.

Read is what is understood to the last key; a key of another kind (convolutions in Tucker form, LoHa, `dora_scale`,
text encoders) is refused by name. Sources: the key names that these libraries write.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from sa3_convert.checkpoint.json_file import listed, read_json, shown
from sa3_convert.checkpoint.tensor_file import TensorFile
from sa3_convert.checkpoint.tensors import DIT_PREFIX
from sa3_convert.errors import LoraError
from sa3_convert.system import untrusted
from sa3_convert.system.checked_files import FileState

SETTINGS: Final = "adapter_config.json"
"""What PEFT writes beside its file."""
_IN_HEADER: Final = "lora_adapter_metadata"
"""Where Diffusers writes the same into a file's header."""
_DECIDING: Final = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "use_qalora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "init_lora_weights", "layer_replication", "lora_bias"),
)
"""Settings of PEFT that decide what an adapter does, or whether it is read."""
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?P<factor>alpha|lora_A|lora_B|lora[_.]down|lora[_.]up|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?",
    re.ASCII,
)
_FACTORS: Final[Mapping[str, str]] = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_down": "lora_A",
    "lora_up": "lora_B",
    "lora.down": "lora_A",
    "lora.up": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}
_WRAPPERS: Final = re.compile(
    r"(base_model\.model\.|diffusion_model\.|lora_unet_|lora_transformer_|unet\.|model[._]|transformer\.(?=transformer\.|to_|p))*",
    re.ASCII,
)
"""What stands before the path of a layer of the DiT."""


def foreign_layers(tensors: TensorFile) -> dict[str, dict[str, str]]:
    """Return factor → name in the file, by layer as the file calls it; LoraError names keys that are not understood."""
    layers: dict[str, dict[str, str]] = {}
    unknown = []
    for name in tensors.entries:
        match = _KEY.fullmatch(name)
        factor = None if match is None else _FACTORS[match["factor"]]
        if match is None or factor is None or factor in layers.setdefault(match["layer"], {}):
            unknown.append(name)
        else:
            layers[match["layer"]][factor] = name
    if unknown:
        raise LoraError(
            f"{tensors.path} is no LoRA that is understood; these of its keys are not: {listed(unknown)}. Read are "
            "<layer>.parametrizations.weight.0.<factor>, and what kohya's scripts, PEFT and Diffusers call lora_A, "
            "lora_B, lora_down, lora_up, alpha and lora_magnitude_vector."
        )
    return layers


def settings_beside(tensors: TensorFile) -> Path | None:
    """Return the file from which the settings of PEFT's adapter come, if one stands beside it that is needed."""
    by_peft = any(match and match["factor"] == "lora_A" for match in map(_KEY.fullmatch, tensors.entries))
    beside = tensors.path.with_name(SETTINGS)
    return beside if by_peft and _IN_HEADER not in tensors.metadata and beside.is_file() else None


def foreign_settings(
    tensors: TensorFile, layers: Mapping[str, Mapping[str, str]], beside: Path | None
) -> dict[str, Any]:
    """Return the settings of another trainer's file, from its header or from what stands beside it."""
    if (text := tensors.metadata.get(_IN_HEADER)) is not None:
        try:
            found = untrusted.parse_json(text)
        except ValueError as error:
            raise LoraError(f"{tensors.path}: {_IN_HEADER} in its header is not JSON: {error}") from None
        found = _of_one_network(tensors.path, found) if isinstance(found, dict) else found
    else:
        found = {} if beside is None else read_json(beside)
    if not isinstance(found, dict):
        raise LoraError(f"{tensors.path}: its settings are {shown(found)}, expected a JSON object.")
    settings: dict[str, Any] = found
    if settings.get("peft_type", "LORA") != "LORA":
        raise LoraError(f"{tensors.path} is of PEFT's kind {json.dumps(settings['peft_type'])}; only LORA is read.")
    by_peft = any("lora_A" in name for names in layers.values() for name in names.values())
    if by_peft and "lora_alpha" not in settings and not all("alpha" in names for names in layers.values()):
        raise LoraError(f"{tensors.path} does not state its alpha. Put PEFT's {SETTINGS} beside it.")
    # Which layers it has is told by its tensors; these are the reference's, with another meaning or none in PEFT.
    own = {key: value for key, value in settings.items() if key not in ("rank", "alpha", "include", "exclude")}
    rows = any("magnitude" in names for names in layers.values())
    alpha = {"alpha": settings["lora_alpha"]} if "lora_alpha" in settings else {}
    return own | alpha | {"adapter_type": "dora-rows" if rows else "lora"}


def _of_one_network(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without what Diffusers puts before each: the network that they are of, of which one is meant.

    Raises:
        LoraError: those of several networks are there, and not the same where they decide what the adapter does.

    """
    networks: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        network, _, name = key.rpartition(".")
        networks.setdefault(network, {})[name] = value
    for name in _DECIDING if len(networks) > 1 else ():
        told = [found.get(name) for found in networks.values()]
        if any(value != told[0] for value in told):
            raise LoraError(
                f"{path} states {name} of several networks ({', '.join(map(shown, networks))}), not the same. Here one "
                "network takes it; save its layers alone."
            )
    return {name: value for found in networks.values() for name, value in found.items()}


def lora_state(path: Path) -> tuple[FileState | None, ...]:
    """Return which bytes an adapter would be read from now: its file's, and those of settings beside it."""
    return tuple(FileState.at(one) if one.is_file() else None for one in (path, path.with_name(SETTINGS)))


def known_layer(layer: str, names: Iterable[str]) -> str | None:
    """Return the tensor of a checkpoint that another trainer's layer is, if it is exactly one."""
    wanted = _plain(_WRAPPERS.sub("", layer, count=1))
    found = [
        name
        for name in names
        if name.endswith(".weight") and name.startswith(DIT_PREFIX) and _plain(name[len(DIT_PREFIX) : -7]) == wanted
    ]
    return found[0] if len(found) == 1 else None


def _plain(path: str) -> str:
    return path.replace(".", "_")

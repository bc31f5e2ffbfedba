"""Seeded damage to headers, indexes and adapter configurations: exit 3, or the same content, and nothing else.

The kinds are mixed: bytes of the file; and words of its JSON, replaced by values that break parsers: nesting, huge
numbers, names twice, other types.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from sa3_convert.checkpoint.lora_file import LoraRequest
from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.tensor_file import TensorFile
from sa3_convert.components import Component
from sa3_convert.errors import InputError
from tests.checkpoint.adapters import CONV, QKV, key, toy_adapter
from tests.checkpoint.sharding import INDEX, shard

TRIALS = 400
"""Of each of four kinds."""

DEEP = "[" * 100_000
PLAIN = [
    "null", "true", "-1", "0", "1", "2147483648", "18446744073709551615", "18446744073709551616", "1e400", "-1e-400",
    "NaN", "Infinity", "0.5", "9" * 400, "9" * 5000, '""', '"F32"', '"I64"', '"../x.safetensors"', '"\\ud800"',
    '"\\u0000"', '"\\u001b[31m"', "[]", "{}", "[0,0]", "[[]]", '{"a":1}', '{"a":1,"a":2}', "[" * 60 + "]" * 60,
    DEEP, '{"a":' * 100_000, "[" * 900 + "]" * 900, "", "}", '"',
]  # fmt: skip


def damaged_json(text: str, rng: random.Random) -> str:
    """Replace, remove or repeat a word, or change a character."""
    words = [piece for piece in json_words(text) if piece.strip()]
    place = rng.randrange(len(words))
    kind = rng.randrange(5)
    if kind < 3:
        words[place] = rng.choice(PLAIN)
    elif kind == 3:
        words[place : place + rng.randrange(1, 4)] = []
    else:
        words[place:place] = words[place : place + rng.randrange(1, 9)]
    return "".join(words)


def json_words(text: str) -> list[str]:
    """Split JSON without escapes into texts, numbers and punctuation."""
    words, inside, word = [], False, ""
    for letter in text:
        if letter == '"':
            word, inside = word + letter, not inside
        elif inside or letter not in "{}[],:":
            word += letter
        else:
            words += [word, letter]
            word = ""
    return [*words, word]


def damaged_header(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(4)
    if kind == 0:
        at = rng.randrange(8 + length)
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 1:
        return rng.choice([2**63, 2**40, length + 1, length - 1, 0, 8, 99_999_999]).to_bytes(8, "little") + content[8:]
    text = damaged_json(header.decode(), rng).encode()
    return len(text).to_bytes(8, "little") + text + rest


def contents(folder: Path) -> dict[str, str]:
    checkpoint = Checkpoint.open(folder)
    for component in Component:
        checkpoint.check_values(component)
    return {component.value: checkpoint.digest(component) for component in Component}


def counted(trial: Callable[[random.Random], object], expected: object, *, least: int) -> None:
    """Run trials; many are refused, and what is read is what was there."""
    refused = []
    for seed in range(TRIALS):
        try:
            found = trial(random.Random(seed))
        except InputError as error:
            refused.append(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}") from error
        else:
            assert found == expected, f"seed {seed} was read as something else"
    assert {error.exit_code for error in refused} == {3}
    assert max(len(str(error)) for error in refused) < 10_000
    assert len(refused) >= least


@pytest.fixture
def tiny(small_toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_toy, tmp_path / "tiny"))


def test_damaged_headers(tiny: Path) -> None:
    expected = contents(tiny)
    path = tiny / "model.safetensors"
    good = path.read_bytes()
    names = sorted(load_file(path))

    def trial(rng: random.Random) -> object:
        path.write_bytes(damaged_header(good, rng))
        # What a tensor is called is content too: a header that renames one is another file, and does not fit.
        found = contents(tiny)
        assert sorted(Checkpoint.open(tiny).weights.entries) == names
        return found

    counted(trial, expected, least=TRIALS // 2)


def test_damaged_indexes(tiny: Path) -> None:
    expected = contents(tiny)
    shard(tiny)
    good = (tiny / INDEX).read_text()

    def trial(rng: random.Random) -> object:
        (tiny / INDEX).write_bytes(damaged_json(good, rng).encode("utf-8", "surrogatepass"))
        return contents(tiny)

    counted(trial, expected, least=TRIALS // 2)


def test_damaged_adapter_configurations(tiny: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", tiny)
    tensors = load_file(path)
    config = json.dumps(
        {"rank": 4, "alpha": 8, "adapter_type": "lora", "use_rslora": False, "include": ["layers.[0-3]", "conv"],
         "exclude": ["x"], "dropout": 0.1, "steps": [1, {"a": 2}]}
    )  # fmt: skip
    checkpoint = Checkpoint.open(tiny)

    def read() -> object:
        lora = checkpoint.with_loras([LoraRequest(path)]).loras[0]
        assert lora.file.layers[QKV]["lora_A"] == key(QKV, "lora_A")
        assert CONV in lora.file.layers
        return (lora.file.type_name, lora.file.rank)

    def trial(rng: random.Random) -> object:
        save_file(tensors, path, {"lora_config": damaged_json(config, rng)})
        return read()

    counted(trial, ("lora", 4), least=TRIALS // 5)


def test_damaged_headers_of_adapters(tiny: Path, tmp_path: Path) -> None:
    path = toy_adapter(tmp_path / "a.safetensors", tiny)
    good = path.read_bytes()
    checkpoint = Checkpoint.open(tiny)
    expected = {name: TensorFile(path).sha256(name) for name in TensorFile(path).entries}

    def trial(rng: random.Random) -> object:
        path.write_bytes(damaged_header(good, rng))
        lora = checkpoint.with_loras([LoraRequest(path)]).loras[0].file
        # Alpha and filters stand in the header, too: another digit there is another adapter, not damage.
        return {name: lora.tensors.sha256(name) for name in lora.tensors.entries}

    counted(trial, expected, least=TRIALS // 3)

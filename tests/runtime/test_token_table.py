"""A table encodes as `tokenizers` does, or there is none; a file that is no table is refused."""

import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sa3_convert.checkpoint.synthetic import toy_tokenizer
from sa3_convert.errors import BundleError
from sa3_convert.runtime.prompts import PromptTokenizer, table_of
from sa3_convert.runtime.token_table import NoTableError, TokenTable, tabulated
from tests.runtime.conftest import Parts

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
ALPHABET = "abé日🎷\n▁\u0301 <>"
TOKENS = ("a", "b", "é", "▁", "日", "ab", "aa", "ba", "▁a", "aab", "aaa", "▁▁", "aaaa", "日a")


def synthetic(tokens: tuple[str, ...] = TOKENS, **model: Any) -> str:
    """Return a `tokenizer.json` in which each token of several characters is merged of every two that make it."""
    vocabulary = {token: number for number, token in enumerate(("<unk>", "<bos>", *tokens))}
    merges = [
        [token[:cut], token[cut:]]
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    if model.get("byte_fallback"):
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(model.pop("bytes", 256))}
    added = [{"id": 1, "content": "<bos>"}, {"id": 200, "content": "<bo"}, {"id": 201, "content": "aa<"}]
    values = {
        "version": "1.0",
        "added_tokens": [token | ADDED for token in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>"} | model,
    }
    return json.dumps(values)


def encoder(content: str) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_str(content)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def both(content: str) -> tuple[TokenTable, Callable[[str], list[int]]]:
    encode = encoder(content)
    table = tabulated(content, encode, (1,), ())
    return TokenTable.from_bytes(table.to_bytes()), encode


FORMS = {
    "toy": toy_tokenizer(),
    "unknown characters apart": synthetic(),
    "unknown characters as one": synthetic(fuse_unk=True),
    "unknown characters dropped": synthetic(unk_token=None),
    "bytes": synthetic(fuse_unk=True, byte_fallback=True),
    "some bytes": synthetic(byte_fallback=True, bytes=200),
    "merges in one text": synthetic(merges=["a b", "a a", "aa b", "▁ a", "aa aa"]),
}


@functools.cache
def made(form: str) -> tuple[TokenTable, Callable[[str], list[int]]]:
    return both(FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_table_encodes_as_the_tokenizer_does(form: str, data: st.DataObject) -> None:
    table, encode = made(form)
    pieces = st.one_of(st.sampled_from((*TOKENS, "<bos>", "<bo", "aa<", "<unk>")), st.text(ALPHABET), st.text())
    text = "".join(data.draw(st.lists(pieces, max_size=12)))
    assert table.encode(text) == encode(text)


def test_the_same_tokenizer_gives_the_same_bytes() -> None:
    content = FORMS["bytes"]
    table = tabulated(content, encoder(content), (1,), (2, 3))
    again = TokenTable.from_bytes(table.to_bytes())
    assert again.to_bytes() == table.to_bytes() == tabulated(content, encoder(content), (1,), (2, 3)).to_bytes()
    assert (again.before, again.after) == ((1,), (2, 3))


UNKNOWN: dict[str, dict[str, Any]] = {
    "normalizer": {"normalizer": {"type": "Lowercase"}},
    "pre-tokenizer": {"pre_tokenizer": {"type": "Whitespace"}},
    "added token": {"added_tokens": [ADDED | {"id": 1, "content": "<bos>", "lstrip": True}]},
    "ignore_merges": {"model": {"ignore_merges": True}},
    "end_of_word_suffix": {"model": {"end_of_word_suffix": "</w>"}},
    "type": {"model": {"type": "WordLevel"}},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_a_table_cannot_say_leaves_none(what: str) -> None:
    values = json.loads(synthetic())
    for key, value in UNKNOWN[what].items():
        values[key] = values[key] | value if key == "model" else value
    with pytest.raises(NoTableError, match=what):
        tabulated(json.dumps(values), lambda text: [0], (), ())


def test_a_table_that_encodes_otherwise_is_not_kept() -> None:
    content = synthetic()
    with pytest.raises(NoTableError, match="otherwise"):
        tabulated(
            content, lambda text: [*encoder(content)(text), 0] if "日" in text else encoder(content)(text), (), ()
        )


WHOLE = made("bytes")[0].to_bytes()


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(WHOLE) - 1), st.binary(max_size=4), st.booleans())
def test_a_damaged_table_is_refused_or_encodes(position: int, wrong: bytes, cut: bool) -> None:
    damaged = WHOLE[:position] + wrong + (b"" if cut else WHOLE[position + len(wrong) :])
    try:
        table = TokenTable.from_bytes(damaged)
    except ValueError:
        return
    assert all(0 <= number < 1 << 32 for number in table.encode("ab aa 日<bos>"))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]\n", WHOLE[:-1], WHOLE + b"\0", WHOLE.replace(b'"format": 1', b'"format": 2')]
)
def test_what_is_no_table_is_a_damaged_bundle(content: bytes, small: Parts, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.table"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.table is no tokenizer that can be used: .*Get the bundle again"):
        PromptTokenizer(path, small.text)


def test_half_of_a_surrogate_pair_is_refused_as_the_tokenizer_does(small: Parts, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.table"
    path.write_bytes(table_of(small.tokenizer))
    with pytest.raises(BundleError, match="fails on this prompt"):
        PromptTokenizer(path, small.text).encode("a\udcff")


LOADED = """
import sys, time
from pathlib import Path
import numpy
from sa3_convert.runtime.token_table import TokenTable

def memory(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) / 1024

path, before, wall, started = Path(sys.argv[1]), memory("VmRSS:"), time.perf_counter(), time.process_time()
if path.suffix == ".table":
    TokenTable.from_bytes(path.read_bytes()).encode("warm analog pad")
    assert "tokenizers" not in sys.modules
else:
    import tokenizers
    tokenizers.Tokenizer.from_str(path.read_text()).encode("warm analog pad")
seconds, wall = time.process_time() - started, time.perf_counter() - wall
print(f"{seconds:.3f} s CPU, {wall:.3f} s, {memory('VmHWM:') - before:.0f} MB more at most, {path.name}")
"""


@pytest.mark.slow
def test_a_vocabulary_of_256_000_loads_at_once(tmp_path: Path) -> None:
    chosen = random.Random(0)
    tokens = [chr(code) for code in range(33, 3033)]
    seen = set(tokens)
    while len(tokens) < 256_000:
        token = tokens[chosen.randrange(len(tokens))] + tokens[chosen.randrange(min(len(tokens), 30_000))]
        if len(token) <= 16 and token not in seen:
            seen.add(token)
            tokens.append(token)
    path = tmp_path / "tokenizer.json"
    path.write_text(synthetic(tuple(tokens), byte_fallback=True, fuse_unk=True), encoding="utf-8")
    table = tmp_path / "tokenizer.table"
    table.write_bytes(table_of(path))
    for file in (path, table):
        done = subprocess.run([sys.executable, "-c", LOADED, str(file)], capture_output=True, text=True, check=True)
        sys.stdout.write(done.stdout)
    words = done.stdout.split()
    assert float(words[0]) < 0.1
    assert float(words[5]) < 60

"""Regular expressions of recipes: what is needed for names of layers, never a catastrophe."""

import re
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.recipe import layer_pattern, own_recipes

NAMES = [f"transformer.layers.{n}.{part}" for n in range(24) for part in ("self_attn.to_qkv", "ff.0.proj", "norm")]
NAMES += ["to_cond_embed.0", "layers.1", "mapping", "a" * 200, "model.layers.11.mlp.down_proj"]


def matches(pattern: str) -> list[bool]:
    return [layer_pattern(pattern).isinstance_python(name) for name in NAMES]


def own_patterns() -> list[str]:
    text = "".join(file.read_text(encoding="utf-8") for file in own_recipes().values())
    return sorted({yaml.safe_load(found) for found in re.findall(r"match: ('[^']*'|[^,']+)", text)})


@pytest.mark.parametrize(
    "pattern",
    [
        *own_patterns(),
        r"^(layers\.\d+\.mlp\.down_proj|transformer\.layers\.\d+\.ff\.0\.proj)$",
        r"\blayers\.\d{1,2}\.",
        r"[^\W\d]+\.\w+$",
        r"[\d.]+ff",
        r"(?i)LAYERS\.(?:1|2)\D",
        r"(?P<n>q|k)_proj",
        r"\\w|\S\s?\.norm",
    ],
)
def test_a_pattern_finds_what_pythons_engine_finds(pattern: str) -> None:
    assert matches(pattern) == [re.search(pattern, name) is not None for name in NAMES]


@given(name=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30))
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    pattern = layer_pattern(f"^({re.escape(name)})$")
    assert pattern.isinstance_python(name)
    assert not pattern.isinstance_python(name + "x")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(.*)*(.*)*(.*)*x",
        "(a|a)" * 60 + "b",
        "a?" * 200 + "a" * 200 + "b",
        "(.?){999}b",
        r"(\w+\d*)*!",
        "^(" + "|".join(re.escape(name) for name in NAMES) * 5 + ")$",
    ],
)
def test_no_pattern_takes_long(pattern: str) -> None:
    began = time.process_time()
    matches(pattern)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "unclosed group"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\p{L}", "names of layers are ASCII"),
        (r"(\w{99}){99}{99}", "too large"),
        ("a{1,999999999999999999999999}", "too large"),
        ("a" * 60_000, "too large"),
        ("(" * 30_000, "not a regular expression"),
    ],
)
def test_what_cannot_be_searched_like_that_is_refused_at_once(pattern: str, said: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=said) as caught:
        layer_pattern(pattern)
    assert time.process_time() - began < 0.5
    assert len(str(caught.value)) < 300

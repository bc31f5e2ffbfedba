"""YAML of others: what JSON could hold, in little time, whatever the text."""

import time

import pytest

from sa3_convert.system.plain_yaml import parse_yaml


def bomb(levels: int, kind: str) -> str:
    lines = ["a0: &a0 {k0: 1, k1: 2}"]
    for level in range(1, levels):
        below = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"[{below}]" if kind == "list" else f"{{<<: [{below}]}}"))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(9, "list"), "more than 10000 values"),
        (bomb(9, "merge"), "more than 10000 values"),
        ("a: &a [*a]", "holds itself"),
        ("&a {b: *a}", "holds itself"),
        ("a: &a {<<: *a}", "holds itself"),
        ("&a\n? *a\n: 1", "holds itself"),
        ("a: *nothing", "undefined alias"),
        ("a: 1\na: 2", "line 2: it names 'a' twice"),
        ("a: {<<: {b: 1}, <<: {b: 2}}", "names '<<' twice"),
        ("1: a", "a key is no word"),
        ("? [a]\n: b", "a key is no word"),
        ("null: a", "a key is no word"),
        ("a: 2024-01-01", "a date is not taken; put it in quotes"),
        ("a: !!set {b}", "no set is taken"),
        ("a: !!binary AAAA", "no binary is taken"),
        ("a: !!python/name:os.system", "is taken"),
        ("a: !mine b", "is taken"),
        ("a: " + "9" * 400, "more than 40 characters"),
        ("a: 1" + ":59" * 5000 + ".5", "more than 40 characters"),
        ("[" * 30_000, "too deep"),
        ("- " * 30_000, "too deep"),
        ("a: " + "[" + "[]," * 10_001 + "]", "more than 10000 values"),
        ("{" + "a, " * 4000 + "}", "names 'a' twice"),
        ("a: b\n---\nc: d", "single document"),
        ("a: \0", "not allowed"),
    ],
)
def test_what_is_not_plain_is_refused_without_much_work(text: str, said: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)
    # A tenth of a second on a quiet machine, and where one of these is not stopped, minutes or all memory.
    assert time.process_time() - began < 10


def test_an_alias_that_says_little_is_taken() -> None:
    text = "a: &a {b: 1, c: [x, 2.5, null, true]}\nd: {<<: *a, b: 3}\ne: [*a, *a]"
    inner = {"b": 1, "c": ["x", 2.5, None, True]}
    assert parse_yaml(text) == {"a": inner, "d": inner | {"b": 3}, "e": [inner, inner]}


def test_nothing_is_null() -> None:
    assert parse_yaml("# only a comment") is None

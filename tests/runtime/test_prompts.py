import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sa3_convert.errors import BundleError, CheckpointError, UsageError
from sa3_convert.runtime.prompts import Around, PromptTokenizer, check_prompt, check_tokenizer
from tests.conftest import Golden
from tests.runtime.conftest import Parts


@pytest.fixture
def tokenizer(small: Parts) -> PromptTokenizer:
    return PromptTokenizer(small.tokenizer, small.text)


def test_golden_prompts_give_the_golden_tokens(golden: Golden, parts: Parts) -> None:
    tokenizer = PromptTokenizer(parts.tokenizer, parts.text)
    for case in golden.of("text_encoder"):
        tokens = tokenizer.encode(case["prompt"])
        np.testing.assert_array_equal(tokens.ids, golden.tensors[case["input_ids"]])
        np.testing.assert_array_equal(tokens.mask, golden.tensors[case["attention_mask"]])


def test_the_empty_prompt_is_padding_alone(tokenizer: PromptTokenizer) -> None:
    tokens = tokenizer.encode("")
    assert not tokens.ids.any()
    assert not tokens.mask.any()
    assert tokens.dropped == 0


def test_a_prompt_of_100_000_characters_is_cut_and_says_how_much(tokenizer: PromptTokenizer) -> None:
    tokens = tokenizer.encode("a b" * 33_334)
    assert tokens.mask.all()
    assert tokens.ids.shape == (1, 16)
    assert tokens.dropped > 10_000
    np.testing.assert_array_equal(tokens.ids, tokenizer.encode("a b" * 16).ids)


def test_tokens_are_static_in_shape_and_of_the_type_that_models_take(tokenizer: PromptTokenizer) -> None:
    tokens = tokenizer.encode("pad")
    assert (tokens.ids.shape, tokens.mask.shape) == ((1, 16), (1, 16))
    assert (tokens.ids.dtype, tokens.mask.dtype) == (np.int32, np.int32)


def test_settings_within_the_file_do_not_change_the_tokens(small: Parts, tmp_path: Path) -> None:
    values = json.loads(small.tokenizer.read_text())
    values["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    values["padding"] = {
        "strategy": {"Fixed": 5},
        "direction": "Left",
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<eos>",
        "pad_to_multiple_of": None,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    expected = PromptTokenizer(small.tokenizer, small.text).encode("a warm pad")
    np.testing.assert_array_equal(PromptTokenizer(path, small.text).encode("a warm pad").ids, expected.ids)


@pytest.mark.parametrize(
    "prompt", ["", "rain\nand wind\tsoft", "🎷🔥 sax", "日本の太鼓", "e\u0301 accent", "x" * 100_000]
)
def test_unusual_prompts_are_fine(tokenizer: PromptTokenizer, prompt: str) -> None:
    check_prompt(prompt)
    assert tokenizer.encode(prompt).ids.shape == (1, 16)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("rain\x00", r"U\+0000 at character 5"), ("\x1b[31m", r"U\+001B"), ("a\x85b", r"U\+0085"), ("\udcff", "Unicode")],
)
def test_control_characters_and_broken_unicode_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_prompt(prompt)


def test_the_message_names_which_prompt_it_is() -> None:
    with pytest.raises(UsageError, match="negative_prompt holds"):
        check_prompt("\x07", "negative_prompt")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"'])
def test_a_damaged_tokenizer_is_a_damaged_bundle(small: Parts, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        PromptTokenizer(path, small.text)


def test_a_missing_tokenizer_is_a_damaged_bundle(small: Parts, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        PromptTokenizer(tmp_path / "tokenizer.json", small.text)


def test_a_tokenizer_cut_anywhere_is_refused(small: Parts, tmp_path: Path) -> None:
    whole = small.tokenizer.read_bytes().rstrip()
    path = tmp_path / "tokenizer.json"
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BundleError):
            PromptTokenizer(path, small.text)


BEGUN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
}
PLAIN: dict[str, Any] = {"post_processor": None}
NAMES = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "__type": "AddedToken"}}
IN_FRONT = "Prompts are encoded as the reference does, with <bos> in front: tokenizer.json."
OVERRULED = "tokenizer_config.json, which overrules tokenizer.json."


@pytest.mark.parametrize(
    ("change", "settings", "before", "after", "note"),
    [
        (PLAIN, None, [], [], ""),
        (PLAIN, {"add_bos_token": False, "add_eos_token": False}, [], [], ""),
        (PLAIN, NAMES, [], [], ""),
        ({"post_processor": BEGUN}, None, [2], [], IN_FRONT),
        ({"post_processor": BEGUN}, NAMES, [2], [], IN_FRONT),
        ({"post_processor": BEGUN}, NAMES | {"add_bos_token": True}, [2], [], IN_FRONT),
        ({"post_processor": BEGUN}, NAMES | {"add_bos_token": False}, [], [], f"no special token: {OVERRULED}"),
        ({"post_processor": BEGUN}, NAMES | {"add_bos_token": None}, [], [], f"no special token: {OVERRULED}"),
        ({"post_processor": BEGUN}, NAMES | {"add_eos_token": True}, [], [1], f"<eos> behind: {OVERRULED}"),
        (
            PLAIN,
            NAMES | {"add_bos_token": True, "add_eos_token": True},
            [2],
            [1],
            f"<bos> in front and <eos> behind: {OVERRULED}",
        ),
    ],
)
def test_special_tokens_are_those_that_the_reference_adds(
    change: Any, settings: Any, before: list[int], after: list[int], note: str, small: Parts, tmp_path: Path
) -> None:
    path = changed(small, tmp_path, change)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    used = check_tokenizer(path, small.text)
    assert used.note.endswith(note)
    assert bool(used.note) == bool(note)
    assert (used.content is None) == ("overrules" not in note)
    tokens = PromptTokenizer(path, small.text, used.content).encode("pad")
    plain = PromptTokenizer(small.tokenizer, small.text).encode("pad")
    expected = [*before, *plain.ids[plain.mask == 1], *after]
    assert tokens.ids[tokens.mask == 1].tolist() == expected
    assert not tokens.ids[tokens.mask == 0].any()


def test_special_tokens_stay_when_a_prompt_is_cut(small: Parts, tmp_path: Path) -> None:
    path = changed(small, tmp_path, PLAIN)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES | {"add_bos_token": True, "add_eos_token": True}))
    tokens = PromptTokenizer(path, small.text, check_tokenizer(path, small.text).content).encode("a b" * 99)
    plain = PromptTokenizer(small.tokenizer, small.text).encode("a b" * 99)
    assert tokens.ids[0].tolist() == [2, *plain.ids[0, :14], 1]
    assert tokens.dropped == plain.dropped + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NAMES | {"add_bos_token": 1}, "add_bos_token is 1, expected true or false"),
        (
            {"bos_token": "<begin>", "add_bos_token": True},
            "adds '<begin>' to prompts, which tokenizer.json does not have",
        ),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    settings: Any, message: str, small: Parts, tmp_path: Path
) -> None:
    path = changed(small, tmp_path, PLAIN)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        check_tokenizer(path, small.text)


def test_a_post_processor_that_changes_more_is_refused(tmp_path: Path) -> None:
    class Reversing:
        def encode(self, text: str, *, add_special_tokens: bool) -> Any:
            return SimpleNamespace(ids=[2, 7, 5] if add_special_tokens else [5, 7])

    with pytest.raises(ValueError, match="does more than put tokens around a prompt"):
        Around.of(Reversing(), tmp_path)  # type: ignore[arg-type]


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
UNUSABLE: dict[str, dict[str, Any]] = {
    "a panic while it is loaded": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a panic on each prompt": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a panic between two normalizers": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": "^"}, "content": " "}, BERT | {"lowercase": True}],
        }
    },
    "a panic over the model": {"model": {"continuing_subword_prefix": "#" * 40}},
    "a pattern without an end": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(q+)+$"}, "behavior": "Isolated", "invert": False}
    },
    "a pattern that is none": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    },
    "no unknown token": {"model": {"unk_token": "nope"}},
    "a dropout": {"model": {"dropout": 0.5}},
    "a normalizer of an unknown kind": {"normalizer": {"type": "Nothing"}},
    "a decoder of an unknown kind": {"decoder": 5},
    "a post-processor of an unknown kind": {"post_processor": {"type": "TemplateProcessing"}},
    "negative ids": {"model": {"vocab": {"a": -1}}},
    "ids beyond 32 bits": {"model": {"vocab": {"a": 1 << 33}}},
}
BEYOND: dict[str, dict[str, Any]] = {
    "a token of the vocabulary": {"model": {"vocab": {"~": 384}}},
    "a token of 31 bits": {"model": {"vocab": {"~": (1 << 31) + 7}}},
    "an added token": {"added_tokens": [{"id": 384, "content": "[zz]"} | ADDED]},
}


def changed(small: Parts, tmp_path: Path, change: dict[str, Any]) -> Path:
    values = json.loads(small.tokenizer.read_text())
    for key, value in change.items():
        if key == "model":
            vocabulary = values["model"]["vocab"] | value.get("vocab", {})
            values["model"] |= value | {"vocab": vocabulary}
        elif key == "added_tokens":
            values[key] += value
        else:
            values[key] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_tokenizer_that_cannot_be_used_is_found_while_converting(
    case: str, small: Parts, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer that can be used: .*Download it again"):
        check_tokenizer(changed(small, tmp_path, UNUSABLE[case]), small.text)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("case", UNUSABLE)
def test_in_a_bundle_it_is_a_damaged_bundle(
    case: str, small: Parts, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = changed(small, tmp_path, UNUSABLE[case])
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        PromptTokenizer(path, small.text).encode("q" * 64 + "! №")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("case", BEYOND)
def test_ids_that_the_table_does_not_have_are_refused(case: str, small: Parts, tmp_path: Path) -> None:
    path = changed(small, tmp_path, BEYOND[case])
    with pytest.raises(CheckpointError, match=r"ids up to .*vocab_size is 384"):
        check_tokenizer(path, small.text)
    with pytest.raises(BundleError, match="the text encoder has 384"):
        PromptTokenizer(path, small.text).encode("~ [zz]")


def test_the_golden_tokenizers_are_fine(parts: Parts) -> None:
    check_tokenizer(parts.tokenizer, parts.text)


LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
COMMAND = """
import sys
from pathlib import Path
from sa3_convert.cli import main
import sa3_convert.cli.app as app
import sa3_convert.runtime.prompts as prompts
from sa3_convert.checkpoint.config import read_layout
prompts.{limit}
app.run = lambda words: prompts.check_tokenizer(Path(words[0]), read_layout(Path(words[1])).text_encoder)
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("limit", "said"),
    [("_ROOM = 1 << 28", "was in use when SIGABRT ended"), ("_ENCODE_SECONDS = 0.5", "took far longer than any such")],
)
def test_a_text_that_grows_without_end_is_stopped(small: Parts, tmp_path: Path, limit: str, said: str) -> None:
    path = changed(small, tmp_path, {"normalizer": {"type": "Sequence", "normalizers": [LONGER] * 14}})
    words = [sys.executable, "-c", COMMAND.format(limit=limit), str(path), str(small.tokenizer.parents[1])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"sa3-convert: {path} {said}")
    assert done.stderr.count("\n") == 1

import json
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.errors import BundleError, UsageError
from sa3_convert.runtime.prompts import PromptTokenizer, check_prompt
from tests.conftest import Golden
from tests.runtime.conftest import Parts


@pytest.fixture
def tokenizer(small: Parts) -> PromptTokenizer:
    return PromptTokenizer(small.tokenizer, 16)


def test_golden_prompts_give_the_golden_tokens(golden: Golden, parts: Parts) -> None:
    tokenizer = PromptTokenizer(parts.tokenizer, 16)
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
    expected = PromptTokenizer(small.tokenizer, 16).encode("a warm pad")
    np.testing.assert_array_equal(PromptTokenizer(path, 16).encode("a warm pad").ids, expected.ids)


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
    with pytest.raises(UsageError, match="The negative prompt"):
        check_prompt("\x07", "negative prompt")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"'])
def test_a_damaged_tokenizer_is_a_damaged_bundle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        PromptTokenizer(path, 16)


def test_a_missing_tokenizer_is_a_damaged_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        PromptTokenizer(tmp_path / "tokenizer.json", 16)


def test_a_tokenizer_cut_anywhere_is_refused(small: Parts, tmp_path: Path) -> None:
    whole = small.tokenizer.read_bytes().rstrip()
    path = tmp_path / "tokenizer.json"
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BundleError):
            PromptTokenizer(path, 16)

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sa3_convert.runtime.conditioning import (
    Encodings,
    conditioning,
    local_conditioning,
    negative_conditioning,
)
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.prompts import PromptTokenizer
from tests.conftest import Golden, assert_close_to_peak
from tests.runtime.conftest import Parts

PROMPT = np.arange(1, 13, dtype=np.float32).reshape(1, 4, 3)
SECONDS = np.full((1, 1, 3), 7, np.float32)


def test_golden_prompts_give_golden_embeddings(golden: Golden, parts: Parts) -> None:
    reference = Pipeline(parts.layout, parts.engine, parts.prompts, parts.bottleneck, keep_loaded=True)
    for case in golden.of("text_encoder"):
        (embedding,) = reference.prompt_embeddings(reference.tokens(case["prompt"]))
        assert_close_to_peak(embedding, golden.tensors[case["output"]], 1e-4)


def test_golden_durations_give_golden_embeddings(golden: Golden, parts: Parts) -> None:
    reference = Pipeline(parts.layout, parts.engine, parts.prompts, parts.bottleneck, keep_loaded=True)
    for case in golden.of("number_conditioner"):
        embedding = reference.seconds_embedding(case["seconds"])
        expected = golden.tensors[case["output"]]
        assert_close_to_peak(embedding, expected.reshape(embedding.shape), 1e-4)


def test_the_duration_comes_after_the_prompt_and_alone_is_global() -> None:
    joined = conditioning(PROMPT, SECONDS)
    np.testing.assert_array_equal(joined.cross_attn_cond, np.concatenate((PROMPT, SECONDS), axis=1))
    np.testing.assert_array_equal(joined.global_embed, SECONDS[:, 0])


def test_without_a_prompt_every_token_is_zero_but_the_global_duration_stays() -> None:
    nothing = conditioning(PROMPT, SECONDS).without_prompt()
    assert nothing.cross_attn_cond.shape == (1, 5, 3)
    assert not nothing.cross_attn_cond.any()
    np.testing.assert_array_equal(nothing.global_embed, SECONDS[:, 0])


def test_a_negative_prompt_has_zeros_at_its_padding_and_keeps_the_duration(small: Parts) -> None:
    tokens = PromptTokenizer(small.tokenizer, replace(small.text, max_length=4)).encode("a")
    assert tokens.mask.tolist() == [[1, 0, 0, 0]]
    negative = negative_conditioning(PROMPT, tokens, SECONDS)
    np.testing.assert_array_equal(negative.cross_attn_cond[:, :1], PROMPT[:, :1])
    assert not negative.cross_attn_cond[:, 1:4].any()
    np.testing.assert_array_equal(negative.cross_attn_cond[:, 4:], SECONDS)


def test_without_inpainting_the_local_conditioning_is_zero() -> None:
    local = local_conditioning(3, 5)
    assert local.shape == (1, 4, 5)
    assert not local.any()


def test_local_conditioning_is_the_mask_and_what_it_keeps() -> None:
    mask = np.array([[[1, 0, 1]]], np.float32)
    latents = np.arange(6, dtype=np.float32).reshape(1, 2, 3) + 1
    local = local_conditioning(2, 3, mask, latents)
    np.testing.assert_array_equal(local[0], [[1, 0, 1], [1, 0, 3], [4, 0, 6]])


def test_an_encoding_is_made_once_for_each_content_and_the_oldest_goes_first() -> None:
    kept, made = Encodings(), list[int]()

    def of(*values: int, dtype: type = np.int32) -> list[int]:
        arrays = [(np.array([[value]], dtype),) for value in values]

        def encode(missing: list[int]) -> list[NDArray[np.float32]]:
            made.extend(values[number] for number in missing)
            return [np.full((1, 1), values[number], np.float32) for number in missing]

        return [int(found[0, 0]) for found in kept.of(arrays, encode)]

    assert of(1, 2, 1) == [1, 2, 1]
    assert sorted(made) == [1, 2]
    assert of(2, 3) == [2, 3]
    assert of(1, dtype=np.int64) == [1]
    assert sorted(made) == [1, 1, 2, 3]
    assert of(*range(100, 130)) == [*range(100, 130)]
    made.clear()
    assert of(3, 1, 2) == [3, 1, 2]
    assert made == [1, 2]


def test_what_is_joined_is_not_mixed_up_with_what_is_apart() -> None:
    kept = Encodings()
    one, two = np.arange(4, dtype=np.float32), np.arange(2, dtype=np.float32)
    inputs = [(one.reshape(2, 2),), (one,), (two, two), (two, two + 2)]
    found = kept.of(inputs, lambda missing: [np.float32([number]) for number in missing])
    assert [int(value[0]) for value in found] == [0, 1, 2, 3]

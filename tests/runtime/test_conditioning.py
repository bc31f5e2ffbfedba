from dataclasses import replace

import numpy as np

from sa3_convert.runtime.conditioning import (
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

"""The pipeline's own doing, with models that are stand-ins."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.checkpoint.dimensions import NoShift
from sa3_convert.components import Component
from sa3_convert.errors import AudioError, BundleError, OutputRejectedError, UsageError
from sa3_convert.runtime.audio import write_audio
from sa3_convert.runtime.conditioning import given_audio
from sa3_convert.runtime.events import AudioChunk, Report, Started, Stepped
from sa3_convert.runtime.loop import crossfaded
from sa3_convert.runtime.noise import TorchGenerator
from sa3_convert.runtime.request import GenerateRequest
from tests.runtime.conftest import Parts
from tests.runtime.fakes import FakeEngine, decode, pipeline

Floats = NDArray[np.float32]


def test_stages_load_one_model_at_a_time_in_order_and_free_it(small: Parts) -> None:
    engine = FakeEngine()
    stages = []
    for event in pipeline(small, engine).stream(GenerateRequest("pad", seconds=1, steps=2)):
        if isinstance(event, Started):
            stages.append(event.stage)
        assert sum(not session.closed for _, session in engine.loaded) <= 1
    assert stages == ["text", "denoise", "decode"]
    assert engine.order == [
        Component.TEXT_ENCODER,
        Component.NUMBER_CONDITIONER,
        Component.DIT,
        Component.DECODER,
    ]
    assert all(session.closed for _, session in engine.loaded)


def test_kept_models_serve_the_next_generation(small: Parts) -> None:
    engine = FakeEngine()
    with pipeline(small, engine, keep_loaded=True) as kept:
        for _ in range(2):
            kept.generate(GenerateRequest("pad", seconds=1, steps=1))
        assert len(engine.loaded) == 4
    assert all(session.closed for _, session in engine.loaded)


def test_the_model_that_was_used_last_stays_until_another_is_needed(small: Parts) -> None:
    engine = FakeEngine()
    with pipeline(small, engine, keep_loaded="last") as kept:
        for _ in range(2):
            kept.seconds_embedding(1.0)
        assert engine.order == [Component.NUMBER_CONDITIONER]
        kept.prompt_embeddings(kept.tokens("pad"))
        assert [session.closed for _, session in engine.loaded] == [True, False]
    assert all(session.closed for _, session in engine.loaded)


def test_start_noise_is_drawn_first_and_then_one_draw_per_step(small: Parts) -> None:
    engine = FakeEngine(dit=lambda x, **_: np.zeros_like(x))
    result = pipeline(small, engine).generate(
        GenerateRequest("pad", seconds=1, steps=2, seed=5, peak="clip"), allow=["clipping"]
    )
    generator = TorchGenerator(5)
    shape = result.report.latents.shape
    start, first, _ = (generator.randn(shape) for _ in range(3))
    feeds = engine.feeds(Component.DIT)
    np.testing.assert_array_equal(feeds[0]["x"], start)
    t = feeds[1]["t"][0]
    np.testing.assert_allclose(feeds[1]["x"], (1 - t) * start + t * first, atol=1e-6)
    np.testing.assert_array_equal(result.report.latents, feeds[1]["x"])


def test_the_audio_has_the_duration_and_only_what_it_needs_is_decoded(small: Parts) -> None:
    engine = FakeEngine()
    result = pipeline(small, engine).generate(GenerateRequest("pad", seconds=2.5, steps=1))
    assert result.audio.shape == (2, int(2.5 * 44100))
    assert result.report.latents.shape[2] == 92
    (decoded,) = engine.feeds(Component.DECODER)
    assert decoded["latents"].shape[2] == 30


def test_chunks_join_without_gap_or_overlap_and_come_as_they_are_decoded(small: Parts) -> None:
    engine = FakeEngine()
    position = 0
    runs = []
    request = GenerateRequest("pad", seconds=5, steps=1, peak="clip")
    for event in pipeline(small, engine, window=16).stream(request):
        if isinstance(event, AudioChunk):
            assert event.start == position
            position += event.samples.shape[1]
            runs.append(len(engine.feeds(Component.DECODER)))
    assert position == 5 * 44100
    assert runs == list(range(1, len(runs) + 1))
    assert len(runs) > 3


def test_every_step_is_reported(small: Parts) -> None:
    events = list(pipeline(small, FakeEngine()).stream(GenerateRequest("pad", seconds=1, steps=3)))
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [(event.step.index, event.steps) for event in steps] == [(0, 3), (1, 3), (2, 3)]
    assert isinstance(events[-1], Report)
    assert set(events[-1].seconds) == {"text", "denoise", "decode"}


def test_a_consumer_that_stops_frees_the_models(small: Parts) -> None:
    engine = FakeEngine()
    stream = pipeline(small, engine).stream(GenerateRequest("pad", seconds=1, steps=3))
    for event in stream:
        if isinstance(event, Stepped):
            break
    stream.close()
    assert len(engine.feeds(Component.DIT)) == 1
    assert all(session.closed for _, session in engine.loaded)


def test_audio_beyond_full_scale_is_clipped(small: Parts) -> None:
    engine = FakeEngine(decoder=lambda latents: 100 * decode(latents))
    result = pipeline(small, engine).generate(
        GenerateRequest("pad", seconds=1, steps=1, peak="clip"), allow=["clipping"]
    )
    assert np.abs(result.audio).max() == 1


def test_output_that_is_no_audio_is_rejected(small: Parts) -> None:
    silent = pipeline(small, FakeEngine(decoder=lambda latents: 0 * decode(latents)))
    with pytest.raises(OutputRejectedError, match="silence"):
        silent.generate(GenerateRequest("pad", seconds=1, steps=1))
    assert not silent.generate(GenerateRequest("pad", seconds=1, steps=1), allow=["silence"]).audio.any()


def test_a_nan_from_the_model_reaches_no_file(small: Parts) -> None:
    broken = pipeline(small, FakeEngine(dit=lambda x, **_: np.full_like(x, np.nan)))
    with pytest.raises(OutputRejectedError, match="non-finite"):
        broken.generate(GenerateRequest("pad", seconds=1, steps=1))


def test_an_unknown_waiver_is_told_before_any_model_is_loaded(small: Parts) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match="no output check"):
        pipeline(small, engine).generate(GenerateRequest("pad"), allow=["everything"])
    assert engine.loaded == []


def test_the_dit_gets_the_same_conditioning_in_every_step(small: Parts) -> None:
    engine = FakeEngine()
    result = pipeline(small, engine).generate(GenerateRequest("pad", seconds=0.4, steps=3))
    sizes = result.report.lengths
    for feed in engine.feeds(Component.DIT):
        assert feed["cross_attn_cond"].shape == (1, 17, 64)
        assert (feed["global_embed"] == np.float32(0.4)).all()
        assert not feed["local_add_cond"].any()
        np.testing.assert_array_equal(feed["padding_mask"], sizes.padding_mask())
    assert (sizes.latents, sizes.valid) == (70, 69)


def test_guidance_evaluates_a_second_time_without_the_prompt(small: Parts) -> None:
    engine = FakeEngine()
    pipeline(small, engine).generate(GenerateRequest("pad", seconds=1, steps=2, cfg_scale=3), allow=["clipping"])
    feeds = engine.feeds(Component.DIT)
    assert len(feeds) == 4
    assert feeds[0]["cross_attn_cond"].any()
    assert not feeds[1]["cross_attn_cond"].any()
    np.testing.assert_array_equal(feeds[0]["x"], feeds[1]["x"])


def test_a_negative_prompt_takes_the_place_of_none(small: Parts) -> None:
    engine = FakeEngine()
    request = GenerateRequest("pad", seconds=1, steps=1, cfg_scale=3, negative_prompt="noise")
    report = pipeline(small, engine).generate(request, allow=["clipping"]).report
    assert engine.order.count(Component.TEXT_ENCODER) == 1
    assert len(engine.feeds(Component.TEXT_ENCODER)) == 2
    assert engine.feeds(Component.DIT)[1]["cross_attn_cond"].any()
    assert report.warnings == ()


def test_a_negative_prompt_without_guidance_is_not_computed_and_warned_of(small: Parts) -> None:
    engine = FakeEngine()
    request = GenerateRequest("pad", seconds=1, steps=1, negative_prompt="noise")
    report = pipeline(small, engine).generate(request).report
    assert len(engine.feeds(Component.TEXT_ENCODER)) == 1
    assert any("no effect" in warning for warning in report.warnings)


def test_guidance_at_some_noise_levels_asks_the_model_once_at_the_others(small: Parts) -> None:
    engine = FakeEngine()
    request = GenerateRequest("pad", seconds=1, steps=4, cfg_scale=3, cfg_interval=(0.9, 1), cfg_rescale=0.5)
    report = pipeline(small, engine).generate(request, allow=["clipping"]).report
    times = [float(feeds["t"][0]) for feeds in engine.feeds(Component.DIT)]
    schedule = request.resolved(small.layout).schedule(report.lengths)[:-1]
    assert times == [float(t) for t in schedule for _ in range(2 if t >= 0.9 else 1)]
    assert len(schedule) < len(times) < 2 * len(schedule)


def test_a_shift_and_a_padding_reach_the_model(small: Parts) -> None:
    engine = FakeEngine()
    request = GenerateRequest("pad", seconds=1, steps=4, dist_shift=NoShift(), duration_padding=0)
    pipeline(small, engine).generate(request)
    first, second, *_ = engine.feeds(Component.DIT)
    assert (first["x"].shape[2], first["padding_mask"].sum()) == (12, 11)
    assert second["t"][0] == np.float32(0.75)


def test_a_loop_is_what_a_longer_generation_gives_its_end_faded_into_its_beginning(small: Parts) -> None:
    engine = FakeEngine()
    made = pipeline(small, engine).generate(GenerateRequest("pad", bpm=100.0, bars=1, beats_per_bar=3, steps=1))
    assert engine.feeds(Component.NUMBER_CONDITIONER)[0]["seconds"] == np.float32(3.6)
    samples, fade = 79380, 26460
    longer = np.concatenate(list(pipeline(small, FakeEngine()).decode(made.report.latents, samples + fade)), axis=2)
    expected = longer[..., :samples].copy()
    expected[..., :fade] = crossfaded(longer[..., samples:], longer[..., :fade])
    assert made.audio.shape == (2, samples)
    np.testing.assert_array_equal(made.audio, np.clip(expected[0], -1, 1))
    assert made.report.request.seconds == 1.8


def test_in_a_loop_given_audio_and_what_is_generated_anew_go_round(small: Parts) -> None:
    engine = FakeEngine()
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4 * 44100)).astype(np.float32)
    request = GenerateRequest("pad", bpm=120.0, bars=1, steps=1, inpaint_audio=audio, inpaint=((0.0, 0.5), (1.5, 2.0)))
    report = pipeline(small, engine).generate(request).report
    assert any("beyond the 2.00 seconds" in warning for warning in report.warnings)
    mask = engine.feeds(Component.DIT)[0]["local_add_cond"][0, 0]
    times = np.arange(mask.size) * 4096 / 44100
    kept = (times < 4) & (times % 2 >= 0.5) & (times % 2 < 1.5)
    np.testing.assert_array_equal(mask[np.abs(times % 0.5 - 0.25) < 0.24], kept[np.abs(times % 0.5 - 0.25) < 0.24])
    sizes = request.lengths(small.layout)
    given = given_audio(small.layout, audio, sizes, [])
    assert given is not None
    np.testing.assert_array_equal(given[..., : 2 * 44100], audio[np.newaxis, :, : 2 * 44100])
    np.testing.assert_array_equal(given[..., 2 * 44100 : 4 * 44100], given[..., : 2 * 44100])
    assert not given[..., 4 * 44100 :].any()


def test_a_long_prompt_is_warned_of(small: Parts) -> None:
    report = pipeline(small, FakeEngine()).generate(GenerateRequest("x" * 100_000, seconds=1, steps=1)).report
    assert any("only the first 16 are heard" in warning for warning in report.warnings)


def test_initial_audio_is_mixed_with_noise_and_the_schedule_starts_there(small: Parts) -> None:
    engine = FakeEngine()
    audio = np.full((2, 44100), 0.5, np.float32)
    request = GenerateRequest("pad", seconds=1, steps=2, init_audio=audio, init_noise_level=0.25)
    pipeline(small, engine).generate(request)
    first = engine.feeds(Component.DIT)[0]
    noise = TorchGenerator(0).randn(first["x"].shape)
    encoded = engine.feeds(Component.ENCODER)[0]["patched_audio"][:, :32, ::16]
    latents = small.bottleneck.encode(encoded)
    assert first["t"][0] == np.float32(0.25)
    np.testing.assert_allclose(first["x"], 0.75 * latents + 0.25 * noise, atol=1e-6)


def test_inpainting_keeps_what_lies_outside_of_the_regions(small: Parts) -> None:
    engine = FakeEngine()
    audio = np.full((2, 5 * 44100), 0.5, np.float32)
    request = GenerateRequest("pad", seconds=5, steps=1, inpaint_audio=audio, inpaint=((1.0, 2.0), (3.0, 4.0)))
    pipeline(small, engine).generate(request)
    local = engine.feeds(Component.DIT)[0]["local_add_cond"]
    mask = local[0, 0]
    kept = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0]))))
    np.testing.assert_allclose(kept * 4096 / 44100, [0, 1, 2, 3, 4, 5], atol=0.1)
    assert not local[0, 1:, mask == 0].any()
    assert local[0, 1:, mask == 1].any()


def test_audio_files_of_any_rate_are_given_to_the_encoder(small: Parts, tmp_path: Path) -> None:
    engine = FakeEngine()
    path = tmp_path / "in.wav"
    write_audio(path, np.full((2, 24000), 0.5, np.float32), 48000)
    pipeline(small, engine).generate(GenerateRequest("pad", seconds=1, steps=1, init_audio=path))
    (feed,) = engine.feeds(Component.ENCODER)
    assert feed["patched_audio"].shape == (1, 512, 76 * 16)
    assert feed["patched_audio"][0, 0, 40] == pytest.approx(0.5, abs=1e-3)
    assert feed["patched_audio"][0, 0, 100] == 0


def test_audio_longer_than_the_duration_is_warned_of(small: Parts) -> None:
    audio = np.full((2, 3 * 44100), 0.5, np.float32)
    request = GenerateRequest("pad", seconds=1, steps=1, init_audio=audio)
    report = pipeline(small, FakeEngine()).generate(request).report
    assert any("lasts 3.00 seconds" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros((1, 10), np.float32),
        np.zeros((2, 0), np.float32),
        np.zeros((2, 10), np.float64),
        np.zeros(10, np.float32),
        np.full((2, 10), np.nan, np.float32),
    ],
)
def test_samples_that_are_no_stereo_audio_are_refused_before_any_model_is_loaded(
    small: Parts, samples: NDArray[Any]
) -> None:
    engine = FakeEngine()
    with pytest.raises(AudioError):
        pipeline(small, engine).generate(GenerateRequest("pad", init_audio=samples))
    assert engine.loaded == []


def test_a_missing_audio_file_is_told_before_any_model_is_loaded(small: Parts, tmp_path: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(AudioError, match=r"nothing\.wav"):
        pipeline(small, engine).generate(GenerateRequest("pad", init_audio=tmp_path / "nothing.wav"))
    assert engine.loaded == []


def test_a_bundle_without_encoder_still_makes_audio_from_text(small: Parts) -> None:
    engine = FakeEngine(lacking=(Component.ENCODER,))
    assert pipeline(small, engine).generate(GenerateRequest("pad", seconds=1, steps=1)).audio.any()
    with pytest.raises(BundleError):
        pipeline(small, engine).generate(GenerateRequest("pad", seconds=1, init_audio=np.ones((2, 9), np.float32)))


def test_an_autoencoder_alone_makes_no_pipeline(small: Parts) -> None:
    alone = dataclasses.replace(small.layout, dit=None, text_encoder=None, number_conditioner=None, objective=None)
    with pytest.raises(BundleError, match="autoencoder alone"):
        pipeline(small, FakeEngine(), alone)


def test_the_report_says_what_was_really_used(small: Parts) -> None:
    report = pipeline(small, FakeEngine()).generate(GenerateRequest("pad", seconds=1)).report
    assert (report.request.steps, report.request.sampler, report.request.cfg_scale) == (8, "pingpong", 1.0)
    assert report.engine == {"engine": "fake"}


@pytest.mark.parametrize("sampler", ["pingpong", "euler", "rk4", "dpmpp"])
def test_every_sampler_runs(small: Parts, sampler: Any) -> None:
    result = pipeline(small, FakeEngine()).generate(GenerateRequest("pad", seconds=1, steps=3, sampler=sampler))
    assert np.isfinite(result.audio).all()


def test_the_same_request_gives_the_same_audio_and_another_seed_another(small: Parts) -> None:
    made = pipeline(small, FakeEngine())
    first, again, other = (
        made.generate(GenerateRequest("pad", seconds=1, steps=2, seed=seed)).audio for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_variations_encode_prompts_and_audio_once_and_are_what_they_are_alone(small: Parts) -> None:
    audio = np.random.default_rng(0).standard_normal((2, 44100)).astype(np.float32) * np.float32(0.1)
    requests = [GenerateRequest("pad", seconds=1, steps=1, seed=seed, init_audio=audio) for seed in (3, 4)]
    engine = FakeEngine()
    made = pipeline(small, engine)
    for request in requests:
        alone = pipeline(small, FakeEngine()).generate(request).audio
        chunks = [e.samples for e in made.stream(request) if isinstance(e, AudioChunk)]
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), alone)
    assert [len(engine.feeds(c)) for c in (Component.TEXT_ENCODER, Component.DIT)] == [1, 2]
    assert engine.order.count(Component.ENCODER) == 1

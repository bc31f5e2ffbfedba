import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.checkpoint.dimensions import FluxShift, FullShift, LogSnrShift, NoShift
from sa3_convert.errors import AudioError, UsageError
from sa3_convert.runtime.request import GenerateRequest, ResolvedRequest
from sa3_convert.runtime.sampling import sigmas
from tests.runtime.conftest import Parts

AUDIO = np.zeros((2, 100), np.float32)
SETTINGS = st.fixed_dictionaries(
    {"prompt": st.text("abc é🎷", max_size=20)},
    optional={
        "seconds": st.none() | st.floats(0.1, 100),
        "seed": st.integers(0, (1 << 64) - 1),
        "steps": st.none() | st.integers(1, 1000),
        "sampler": st.sampled_from([None, "pingpong", "euler", "rk4", "dpmpp"]),
        "cfg_scale": st.none() | st.floats(0, 20),
        "apg_scale": st.floats(0, 1),
        "cfg_interval": st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
        "cfg_rescale": st.floats(0, 1),
        "cfg_norm_threshold": st.floats(0, 100),
        "dist_shift": st.sampled_from([None, NoShift(), LogSnrShift(rate=0.5), FluxShift(alpha_max=3), FullShift()]),
        "duration_padding": st.floats(0, 600),
        "negative_prompt": st.none() | st.text("abc", max_size=5),
    },
)


def as_dict(request: GenerateRequest) -> dict[str, Any]:
    return {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}


@given(settings=SETTINGS)
def test_settings_survive_json(settings: dict[str, Any]) -> None:
    request = GenerateRequest(**settings)
    assert as_dict(GenerateRequest.from_json(json.loads(json.dumps(request.to_json())))) == as_dict(request)


def test_audio_files_and_regions_survive_json() -> None:
    request = GenerateRequest(
        "pad",
        init_audio=Path("a.wav"),
        init_noise_level=0.5,
        inpaint_audio=Path("b.flac"),
        inpaint=((1.0, 2.0), (3.0, 4.5)),
    )
    assert as_dict(GenerateRequest.from_json(json.loads(json.dumps(request.to_json())))) == as_dict(request)


def test_a_resolved_request_replays_as_itself(small: Parts) -> None:
    resolved = GenerateRequest("pad", seconds=3, init_audio=Path("a.wav")).resolved(small.layout)
    again = GenerateRequest.from_json(resolved.to_json()).resolved(small.layout)
    assert as_dict(again) == as_dict(resolved)


def test_settings_of_before_are_read_without_the_keys_that_came_later(small: Parts) -> None:
    request = GenerateRequest.from_json({"prompt": "pad", "seconds": 3.0, "seed": 1, "apg_scale": 1.0, "inpaint": []})
    resolved = request.resolved(small.layout)
    assert (resolved.cfg_interval, resolved.cfg_rescale, resolved.cfg_norm_threshold) == ((0, 1), 0, 0)
    assert (resolved.dist_shift, resolved.duration_padding) == (LogSnrShift(rate=0), 6)


def test_a_checkpoints_own_shift_is_taken_and_a_requests_replaces_it(small: Parts) -> None:
    layout = dataclasses.replace(small.layout, sampling_shift=FullShift(base_shift=1))
    sizes = GenerateRequest("pad").lengths(layout)
    own, asked = (GenerateRequest("pad", dist_shift=shift).resolved(layout) for shift in (None, NoShift()))
    assert own.dist_shift == FullShift(base_shift=1)
    np.testing.assert_array_equal(own.schedule(sizes), sigmas(8, 1.0, FullShift(base_shift=1), 108))
    np.testing.assert_allclose(asked.schedule(sizes), np.linspace(1, 0, 9), atol=1e-7)


def test_a_shift_whose_schedule_would_rise_at_this_length_is_refused(small: Parts) -> None:
    shift = LogSnrShift(rate=2)
    assert GenerateRequest("pad", seconds=100, dist_shift=shift).resolved(small.layout).dist_shift == shift
    with pytest.raises(UsageError, match=r"schedule of 11 latents would start at a log-SNR of 8\.8.*below its end, 2"):
        GenerateRequest("pad", seconds=1, dist_shift=shift).resolved(small.layout)


def test_padding_changes_what_is_generated_and_not_what_is_heard(small: Parts) -> None:
    usual, short = (GenerateRequest("pad", duration_padding=p).lengths(small.layout) for p in (6.0, 0.0))
    assert (usual.samples, usual.latents, usual.valid) == (441000, 174, 172)
    assert (short.samples, short.latents, short.valid) == (441000, 108, 108)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"cfg_scale": 3.0, "cfg_interval": (0.5, 1.0), "cfg_rescale": 1.0, "negative_prompt": "a"}, []),
        ({"cfg_interval": (0.5, 1.0)}, ["The interval of guidance has no effect without guidance (a scale of 1)."]),
        (
            {"cfg_rescale": 0.5, "cfg_norm_threshold": 2.0, "negative_prompt": "a", "apg_scale": 0.5},
            [
                f"{words} has no effect without guidance (a scale of 1)."
                for words in (
                    "The negative prompt",
                    "The scale of APG",
                    "Rescaling guidance",
                    "The norm threshold of guidance",
                )
            ],
        ),
        (
            {"cfg_scale": 3.0, "cfg_interval": (0.0, 0.1)},
            ["No step starts at a noise level within 0:0.1, so there is no guidance."],
        ),
    ],
)
def test_settings_without_an_effect_are_told(small: Parts, settings: dict[str, Any], expected: list[str]) -> None:
    request = GenerateRequest("pad", **settings).resolved(small.layout)
    assert request.contradictions(request.lengths(small.layout)) == expected


def test_a_loop_is_resolved_and_replayed_and_its_bars_can_be_changed(small: Parts) -> None:
    resolved = GenerateRequest("pad", bpm=120.0, bars=4).resolved(small.layout)
    assert resolved.seconds == 8
    assert resolved.generated_seconds == 10
    written = json.loads(json.dumps(resolved.to_json()))
    assert as_dict(GenerateRequest.from_json(written).resolved(small.layout)) == as_dict(resolved)
    assert GenerateRequest.from_json({**written, "bars": 2}).resolved(small.layout).seconds == 4


def test_a_loop_has_the_lengths_of_what_is_generated_for_it_and_its_own_samples(small: Parts) -> None:
    loop = GenerateRequest("pad", bpm=120.0, bars=4).lengths(small.layout)
    plain = GenerateRequest("pad", seconds=10).lengths(small.layout)
    assert (loop.latents, loop.valid, loop.wanted) == (plain.latents, plain.valid, plain.wanted)
    assert (loop.samples, loop.surplus, loop.fade) == (8 * 44100, 2 * 44100, 22050)


def test_a_loop_that_leaves_no_room_for_a_bar_more_is_refused(small: Parts) -> None:
    with pytest.raises(UsageError, match=r"bars are too many: .* they last 122\.0 seconds.*limit is 120\.0"):
        GenerateRequest("pad", bpm=120.0, bars=60).resolved(small.layout)


def test_samples_cannot_be_written_down() -> None:
    with pytest.raises(ValueError, match="init_audio is an array"):
        GenerateRequest("pad", init_audio=AUDIO).to_json()


def test_a_distilled_model_takes_few_steps_without_guidance(small: Parts) -> None:
    resolved = GenerateRequest("pad").resolved(small.layout)
    assert isinstance(resolved, ResolvedRequest)
    assert (resolved.sampler, resolved.steps, resolved.cfg_scale) == ("pingpong", 8, 1.0)


def test_a_base_model_takes_many_steps_with_guidance(base: Parts) -> None:
    resolved = GenerateRequest("pad").resolved(base.layout)
    assert (resolved.sampler, resolved.steps, resolved.cfg_scale) == ("euler", 50, 7.0)


def test_what_was_set_is_kept(base: Parts) -> None:
    resolved = GenerateRequest("pad", steps=3, sampler="rk4", cfg_scale=0.0).resolved(base.layout)
    assert (resolved.sampler, resolved.steps, resolved.cfg_scale) == ("rk4", 3, 0.0)


def test_initial_audio_is_noised_by_nine_tenths_by_default(small: Parts) -> None:
    assert GenerateRequest("pad", init_audio=AUDIO).resolved(small.layout).init_noise_level == 0.9
    assert GenerateRequest("pad", init_audio=AUDIO, init_noise_level=0.3).resolved(small.layout).init_noise_level == 0.3


def test_a_duration_beyond_the_model_is_refused_when_resolved(small: Parts) -> None:
    request = GenerateRequest("pad", seconds=121)
    with pytest.raises(UsageError, match="limit"):
        request.resolved(small.layout)


def test_an_autoencoder_alone_cannot_generate(small: Parts) -> None:
    alone = dataclasses.replace(small.layout, dit=None, text_encoder=None, number_conditioner=None, objective=None)
    with pytest.raises(UsageError, match="autoencoder alone"):
        GenerateRequest("pad").resolved(alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "a\x00"}, "control character"),
        ({"negative_prompt": "a\x00"}, "negative_prompt holds"),
        ({"seconds": 0.0}, "positive"),
        ({"seconds": -1.0}, "positive"),
        ({"seconds": float("nan")}, "positive"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; give pingpong"),
        ({"cfg_scale": float("inf")}, "cfg_scale"),
        ({"apg_scale": float("nan")}, "apg_scale"),
        ({"bpm": 120.0}, "bpm and bars belong together"),
        ({"bars": 4}, "bpm and bars belong together"),
        ({"beats_per_bar": 3}, "give bpm and bars, too"),
        ({"bpm": 0.0, "bars": 4}, "bpm is 0.0; give 10 to 1000"),
        ({"bpm": float("nan"), "bars": 4}, "bpm is nan"),
        ({"bpm": 120.0, "bars": 0}, "bars is 0; give 1 to 1000"),
        ({"bpm": 120.0, "bars": 4, "beats_per_bar": 0}, "beats_per_bar is 0"),
        ({"bpm": 120.0, "bars": 4, "seconds": 10.0}, "seconds contradicts bpm and bars, which make 8 seconds"),
        ({"bpm": 120.0, "bars": 4, "inpaint_audio": AUDIO, "inpaint": ((7.0, 8.5),)}, "outside of the 8 seconds"),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval 0.5:0.2 is none"),
        ({"cfg_interval": (0.0, 1.1)}, "cfg_interval 0:1.1"),
        ({"cfg_interval": (float("nan"), 1.0)}, "cfg_interval nan:1"),
        ({"cfg_rescale": -0.1}, "cfg_rescale"),
        ({"cfg_rescale": 1.1}, "cfg_rescale"),
        ({"cfg_norm_threshold": -1.0}, "cfg_norm_threshold"),
        ({"cfg_norm_threshold": float("inf")}, "cfg_norm_threshold"),
        ({"duration_padding": -1.0}, "duration_padding"),
        ({"duration_padding": 1e308}, "0 to 600 seconds"),
        ({"dist_shift": "flux"}, "dist_shift is 'flux'"),
        ({"init_noise_level": 0.5}, "needs init_audio"),
        ({"init_audio": AUDIO, "init_noise_level": 0.0}, "above 0"),
        ({"init_audio": AUDIO, "init_noise_level": 1.1}, "at most 1"),
        ({"init_audio": AUDIO, "init_noise_level": float("nan")}, "init_noise_level"),
        ({"inpaint": ((0.0, 1.0),)}, "inpaint needs inpaint_audio"),
        ({"inpaint_audio": AUDIO}, "at least one region"),
        ({"inpaint_audio": AUDIO, "inpaint": ((5.0, 2.0),)}, "5:2 ends before"),
        ({"seconds": 10.0, "inpaint_audio": AUDIO, "inpaint": ((5.0, 11.0),)}, "outside"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateRequest(**{"prompt": "pad", **settings})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "a", "promt": "b"}, "'promt'. Perhaps you meant 'prompt'"),
        ({"prompt": "a", "zzz": 1}, "no setting 'zzz'"),
        ({"prompt": 3}, "prompt is 3, expected text"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": "a", "seconds": "10"}, "seconds is '10', expected a number"),
        ({"prompt": "a", "seconds": True}, "seconds is True"),
        ({"prompt": "a", "bars": 2.5, "bpm": 100}, "bars is 2.5, expected a whole number"),
        ({"prompt": "a", "bpm": "fast", "bars": 2}, "bpm is 'fast', expected a number"),
        ({"prompt": "a", "steps": 2.5}, "whole number"),
        ({"prompt": "a", "seed": True}, "seed is True"),
        ({"prompt": "a", "inpaint": [1, 2]}, "list of"),
        ({"prompt": "a", "inpaint": [[1, 2, 3]]}, "list of"),
        ({"prompt": "a", "inpaint": [[1, "2"]]}, "list of"),
        ({"prompt": "a", "inpaint": None}, "list of"),
        ({"prompt": "a", "sampler": "x"}, "sampler is 'x'"),
        ({"prompt": "a", "cfg_interval": [0, 1, 2]}, r"expected \[low, high\]"),
        ({"prompt": "a", "cfg_interval": None}, r"expected \[low, high\]"),
        ({"prompt": "a", "cfg_rescale": None}, "cfg_rescale is None"),
        ({"prompt": "a", "dist_shift": "flux"}, "dist_shift.* is str, expected an object"),
        ({"prompt": "a", "dist_shift": {"type": "cosine"}}, "only 'none', 'logsnr', 'flux', 'full' are supported"),
        ({"prompt": "a", "dist_shift": {"type": []}}, "dist_shift.*type"),
        ({"prompt": "a", "dist_shift": {}}, "it has no 'type'"),
        ({"prompt": "a", "dist_shift": {"type": "flux", "alpha": 1}}, "dist_shift.*alpha is not supported"),
        ({"prompt": "a", "dist_shift": {"type": "flux", "alpha_min": "1"}}, "alpha_min is '1', expected a number"),
        ({"prompt": "a", "dist_shift": {"type": "flux", "alpha_min": 0}}, "at least 0.01"),
        ({"prompt": "a", "seconds": 10**400}, "seconds is a number beyond all bounds"),
        ({"prompt": "a", "seconds": 10**5000}, "seconds is a number beyond all bounds"),
        ({"prompt": "a", "steps": 10**5000}, "steps is a number beyond all bounds"),
        ({"prompt": "a", "seed": -(10**5000)}, "seed is a number beyond all bounds"),
        ({"prompt": "a", "cfg_scale": 10**400}, "cfg_scale is a number"),
        ({"prompt": "a", "inpaint": [[0, 10**400]]}, "list of"),
        ({"prompt": "a", "init_audio": "a\0b"}, "no file is called"),
        ({"prompt": "a", "init_audio": ""}, "no file is called"),
        ({"prompt": "a", "inpaint_audio": "\ud800", "inpaint": [[0, 1]]}, "no file is called"),
        ({"prompt": "a\ud800"}, "not valid Unicode"),
        ({"prompt": "a", "negative_prompt": "\0"}, "control character"),
        ({"prompt": "a", "inpaint": [[0, 1]] * 100_000, "inpaint_audio": "a"}, "overlaps"),
    ],
)
def test_json_of_the_wrong_kind_is_refused_by_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateRequest.from_json(values)


def test_whole_numbers_are_numbers() -> None:
    assert GenerateRequest.from_json({"prompt": "a", "seconds": 10}).seconds == 10.0


def test_a_random_seed_is_drawn_when_it_is_read() -> None:
    seeds = {GenerateRequest.from_json({"prompt": "a", "seed": "random"}).seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 1 << 32 for seed in seeds)
    with pytest.raises(UsageError, match="seed is 'rnd'"):
        GenerateRequest.from_json({"prompt": "a", "seed": "rnd"})


def test_it_lasts_as_long_as_the_given_audio(small: Parts, tmp_path: Path) -> None:
    def seconds(**settings: Any) -> float:
        return GenerateRequest("pad", **settings).resolved(small.layout).seconds

    samples = np.zeros((2, 44101), np.float32)
    soundfile.write(tmp_path / "a.wav", samples.T[:22051], 22050)
    assert seconds() == 10.0
    assert int(seconds(init_audio=samples) * 44100) == 44101
    assert int(seconds(init_audio=tmp_path / "a.wav") * 44100) == 44102
    assert seconds(init_audio=samples, seconds=3.0) == 3.0
    assert seconds(inpaint_audio=samples, inpaint=((0.5, 2.5),)) == 2.5
    assert seconds(init_audio=np.zeros((2, 121 * 44100), np.float32)) == small.layout.sample_size / 44100
    with pytest.raises(UsageError, match="outside of the 120"):
        seconds(inpaint_audio=samples, inpaint=((0.5, 121.0),))
    with pytest.raises(AudioError, match="gone"):
        seconds(init_audio=tmp_path / "gone.wav")

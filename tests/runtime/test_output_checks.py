import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_convert.errors import OutputRejectedError, UsageError
from sa3_convert.runtime.output_checks import CHECKS, OutputCheck

Floats = NDArray[np.float32]


def tone(samples: int = 1000, peak: float = 0.5) -> Floats:
    wave = peak * np.sin(np.arange(samples, dtype=np.float32) / 10)
    return np.stack((wave, -wave))[np.newaxis].astype(np.float32)


def judge(audio: Floats, *allow: str, samples: int | None = None) -> None:
    check = OutputCheck(allow)
    half = audio.shape[2] // 2
    for chunk in (audio[:, :, :half], audio[:, :, half:]):
        if chunk.shape[2]:
            check.add(chunk)
    check.finish(audio.shape[2] if samples is None else samples)


BAD: dict[str, Floats] = {
    "non-finite": np.where(np.arange(1000) == 700, np.nan, tone()).astype(np.float32),
    "silence": tone(peak=1e-6),
    "constant": np.full((1, 2, 1000), 0.25, np.float32),
    "clipping": tone(peak=3),
}


def test_a_tone_is_audio() -> None:
    judge(tone())


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_no_audio_is_rejected_by_name(name: str) -> None:
    with pytest.raises(OutputRejectedError, match=f"check '{name}'"):
        judge(BAD[name])


@pytest.mark.parametrize("name", sorted(BAD))
def test_each_check_can_be_waived_by_its_name(name: str) -> None:
    judge(BAD[name], name)


@pytest.mark.parametrize("name", sorted(BAD))
def test_waiving_the_others_does_not_waive_a_check(name: str) -> None:
    with pytest.raises(OutputRejectedError, match=name):
        judge(BAD[name], *(set(CHECKS) - {name}))


@pytest.mark.parametrize("samples", [999, 1001])
def test_another_length_than_asked_for_is_rejected(samples: int) -> None:
    with pytest.raises(OutputRejectedError, match=r"'duration'.*1000 samples"):
        judge(tone(), samples=samples)
    judge(tone(), "duration", samples=samples)


def test_infinities_are_found_although_clipping_would_hide_them() -> None:
    audio = tone()
    audio[0, 0, 3] = np.inf
    with pytest.raises(OutputRejectedError, match="non-finite"):
        judge(audio)


def test_one_silent_channel_is_no_silence() -> None:
    audio = tone()
    audio[:, 0] = 0
    judge(audio)


def test_a_few_clipped_samples_are_music() -> None:
    audio = tone()
    audio[0, 0, :20] = 1.5
    judge(audio)


def test_silence_is_judged_over_the_whole_not_over_a_chunk() -> None:
    audio = tone()
    audio[:, :, :500] = 0
    judge(audio)


def test_equal_output_for_different_seeds_is_rejected_unless_waived() -> None:
    with pytest.raises(OutputRejectedError, match="seeds 1 and 2"):
        OutputCheck().duplicate(1, 2)
    OutputCheck(["duplicate"]).duplicate(1, 2)


def test_an_unknown_check_cannot_be_waived() -> None:
    with pytest.raises(UsageError, match="no output check 'loudness'"):
        OutputCheck(["loudness"])


def test_nothing_at_all_fails_by_its_duration() -> None:
    with pytest.raises(OutputRejectedError, match="duration"):
        OutputCheck().finish(10)

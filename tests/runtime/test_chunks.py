import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_convert.runtime.autoencode import Reach, windows
from tests.runtime.conftest import open_parts

REACHES = st.builds(
    lambda align, left, right: Reach(align, left * align, right * align),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(0, 5),
)


@given(reach=REACHES, groups=st.integers(1, 80), share=st.floats(0.01, 1), extra=st.integers(0, 40))
def test_kept_parts_join_and_have_all_the_context_there_is(reach: Reach, groups: int, share: float, extra: int) -> None:
    total = groups * reach.align
    wanted = max(1, int(total * share))
    found = list(windows(total, wanted, reach.smallest_window + extra, reach))
    position = 0
    for window in found:
        assert window.keep_start == position
        position = window.keep_stop
        assert window.start % reach.align == window.stop % reach.align == 0
        assert 0 <= window.start <= window.keep_start < window.keep_stop <= window.stop <= total
        assert window.start == 0 or window.keep_start - window.start >= reach.left
        assert window.stop == total or window.stop - reach.whole(window.keep_stop) >= reach.right
    assert position == wanted
    assert len({window.stop - window.start for window in found}) == 1


@given(reach=REACHES, groups=st.integers(1, 80), extra=st.integers(0, 40))
def test_windows_are_no_longer_than_asked_for(reach: Reach, groups: int, extra: int) -> None:
    size = reach.smallest_window + extra
    total = groups * reach.align
    assert all(window.stop - window.start <= reach.whole(size) for window in windows(total, total, size, reach))


def test_the_last_window_is_not_mostly_overlap() -> None:
    found = [(window.start, window.stop) for window in windows(388, 323, 128, Reach(2, 2, 2))]
    assert found == [(0, 112), (108, 220), (214, 326)]


def test_what_is_not_wanted_is_not_computed() -> None:
    (window,) = windows(1000, 10, 128, Reach(2, 2, 2))
    assert (window.start, window.stop) == (0, 12)


@pytest.mark.parametrize(("total", "wanted", "size"), [(7, 7, 20), (8, 0, 20), (8, 9, 20), (8, 8, 5)])
def test_impossible_plans_are_refused(total: int, wanted: int, size: int) -> None:
    with pytest.raises(ValueError, match="latents"):
        list(windows(total, wanted, size, Reach(2, 2, 2)))


def test_same_s_reaches_one_window_to_each_side() -> None:
    auto = open_parts("small").layout.autoencoder
    assert Reach.of_decoder(auto.decoder) == Reach(2, 2, 2)
    assert Reach.of_encoder(auto.encoder) == Reach(2, 2, 2)


def test_same_l_reaches_as_far_as_its_depth() -> None:
    decoder = dataclasses.replace(open_parts("medium").layout.autoencoder.decoder, depth=12)
    assert Reach.of_decoder(decoder) == Reach(1, 12, 12)


def test_a_wide_mapping_before_the_layers_adds_to_their_reach() -> None:
    small = dataclasses.replace(open_parts("small").layout.autoencoder.encoder, mapping_kernel=3)
    assert Reach.of_encoder(small) == Reach(2, 4, 4)
    medium = dataclasses.replace(open_parts("medium").layout.autoencoder.encoder, mapping_kernel=3)
    assert Reach.of_encoder(medium) == Reach(1, 3, 3)

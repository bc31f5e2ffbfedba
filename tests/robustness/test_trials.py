"""Whatever happens to a conversion, nothing damaged is accepted afterwards and the next run completes it.

Each kind has a few trials in every test run; the counts behind `slow` make more than 200 in all.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sa3_convert.components import Component
from tests.robustness.trials import (
    Place,
    Server,
    afresh,
    check_completed,
    command_here,
    damage,
    digests,
    ended,
    filled_after,
    kill_at,
    leftovers,
    moments,
    on_own_disk,
    remount,
    set_clock_of_files,
)

SMALL = ("number_conditioner",)
"""One component: a trial in a second or two."""
ALL = tuple(component.value for component in Component)
SPAN = {SMALL: 2.0, ALL: 25.0}
"""Seconds in which a conversion is surely under way on any machine; some trials end before the kill."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("logs")
    working = Path.cwd()
    os.chdir(Path(__file__).parents[2])
    yield Server(folder)
    os.chdir(working)


def clean(server: Server, toy: Path, components: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Return the digests that an undisturbed conversion leaves."""
    place = Place.under(folder)
    result = server.run(place.command(toy, components))
    assert result.code == 0, result.output
    return digests(place.out)


@pytest.fixture(scope="module")
def expected(server: Server, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return clean(server, toy, SMALL, tmp_path_factory.mktemp("clean"))


def many(few: int, full: int) -> list[object]:
    """Return a parameter with a few trials for every run and one with all of them."""
    return [few, pytest.param(full, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", many(3, 60))
def test_a_conversion_killed_at_any_moment(
    count: int, server: Server, toy: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    command = Place.under(tmp_path).command(toy, SMALL)
    for seconds in moments(count, SPAN[SMALL], seed=1):
        place = afresh(Place.under(tmp_path))
        kill_at(server, command, seconds)
        assert damage(place, expected) == []
        check_completed(place, server.run(command), expected)


@pytest.mark.parametrize("count", many(2, 40))
def test_a_conversion_over_a_bundle_killed_at_any_moment(
    count: int, server: Server, toy: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    place = Place.under(tmp_path)
    command = place.command(toy, SMALL)
    check_completed(place, server.run(command), expected)
    for seconds in moments(count, SPAN[SMALL], seed=2):
        kill_at(server, [*command, "--force"], seconds)
        assert damage(place, expected) == []
        check_completed(place, server.run(command), expected)


@pytest.mark.slow
def test_a_whole_conversion_killed_again_and_again_comes_to_its_end(server: Server, toy: Path, tmp_path: Path) -> None:
    """Every start gets further than the last, because finished stages are kept."""
    whole = clean(server, toy, ALL, tmp_path / "clean")
    place = Place.under(tmp_path)
    command = place.command(toy, ALL)
    for seconds in moments(20, SPAN[ALL], seed=3):
        kill_at(server, command, seconds)
        assert damage(place, whole) == []
    check_completed(place, server.run(command), whole)


def disk_trial(folder: str, toy: str, seconds: float, wanted: dict[str, str], log: str) -> None:
    """Convert on a disk that another process fills on the way, look, free it, and convert again."""
    disk = Path(folder)
    on_own_disk(disk, 64)
    place = Place.under(disk)
    command = place.command(Path(toy), SMALL)
    with filled_after(seconds, disk):
        code = command_here(command, log)
    output = Path(log).read_text()
    if code != 0:
        assert code in {3, 4}, (code, output)
        assert any(words in output for words in ("No space left", "disk left", "disk is full", "Not enough room")), (
            output
        )
    assert damage(place, wanted) == []
    assert command_here(command, log + ".again") == 0, Path(log + ".again").read_text()
    assert digests(place.out) == wanted
    assert damage(place, wanted) == []
    assert leftovers(place) == []


@pytest.mark.parametrize("count", many(3, 60))
def test_a_disk_that_runs_full(count: int, server: Server, toy: Path, expected: dict[str, str], tmp_path: Path) -> None:
    for index, seconds in enumerate(moments(count, SPAN[SMALL], seed=4)):
        log = tmp_path / f"{index}.log"
        arguments = (str(tmp_path / "disk"), str(toy), seconds, expected, str(log))
        assert server.call(disk_trial, *arguments) == 0, f"after {seconds} s: {log.read_text()}"


def small_disk_trial(folder: str, toy: str, log: str) -> None:
    """Convert on a disk that is too small from the start."""
    disk = Path(folder)
    on_own_disk(disk, 0.1)
    place = Place.under(disk)
    assert command_here(place.command(Path(toy), SMALL), log) == 3, Path(log).read_text()
    assert "Not enough room" in Path(log).read_text()
    assert not list(disk.rglob("*.mnn"))


def test_a_disk_that_is_too_small_is_told_at_once(server: Server, toy: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert server.call(small_disk_trial, str(tmp_path / "disk"), str(toy), str(log)) == 0, log.read_text()


def read_only_trial(folder: str, toy: str, wanted: dict[str, str], log: str) -> None:
    """Convert into a folder that may not be written into, then into the same one when it may."""
    disk = Path(folder)
    on_own_disk(disk, 64)
    place = Place.under(disk)
    command = place.command(Path(toy), SMALL)
    remount(disk, "ro")
    assert command_here(command, log) == 3, Path(log).read_text()
    assert "Read-only file system" in Path(log).read_text()
    remount(disk, "rw")
    assert command_here(command, log) == 0, Path(log).read_text()
    assert digests(place.out) == wanted


def test_an_output_that_may_not_be_written(server: Server, toy: Path, expected: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert server.call(read_only_trial, str(tmp_path / "disk"), str(toy), expected, str(log)) == 0, log.read_text()


@pytest.mark.parametrize("count", many(1, 15))
def test_two_conversions_into_one_folder(
    count: int, server: Server, toy: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """One does it; the other is told so, or comes late enough to find nothing to do."""
    for _ in range(count):
        place = afresh(Place.under(tmp_path))
        started = [server.start(place.command(toy, SMALL)) for _ in range(2)]
        results = [ended(*each) for each in started]
        assert {0} <= {r.code for r in results} <= {0, 2}, [r.output for r in results]
        assert all("Another conversion" in r.output for r in results if r.code == 2)
        check_completed(place, server.run(place.command(toy, SMALL)), expected)


@pytest.mark.parametrize("count", many(1, 15))
def test_two_conversions_with_one_cache(
    count: int, server: Server, toy: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    for _ in range(count):
        places = [Place(tmp_path / name, tmp_path / "cache") for name in ("first", "second")]
        for place in places:
            afresh(place)
        started = [server.start(place.command(toy, SMALL)) for place in places]
        # Both first: what one has under way in the shared cache is no leftover.
        for place, result in zip(places, [ended(*each) for each in started], strict=True):
            check_completed(place, result, expected)


@pytest.mark.parametrize("count", many(2, 40))
def test_a_limit_of_memory(count: int, server: Server, toy: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Wherever memory runs out the command says so, unless a library crashes on it; nothing is accepted either way."""
    command = Place.under(tmp_path).command(toy, SMALL)
    failed = 0
    for mebibytes in moments(count, 60, seed=5):
        place = afresh(Place.under(tmp_path))
        result = server.run(command, limit=int(mebibytes * 2**20))
        assert result.code in {0, 4, -signal.SIGSEGV, -signal.SIGABRT}, (result.code, mebibytes, result.output)
        failed += result.code != 0
        assert damage(place, expected) == []
        check_completed(place, server.run(command), expected)
    assert failed, "no limit was low enough to matter"


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_moved(years: int, server: Server, toy: Path, expected: dict[str, str], tmp_path: Path) -> None:
    place = Place.under(tmp_path)
    command = place.command(toy, SMALL)
    check_completed(place, server.run(command), expected)
    set_clock_of_files(place, years * 365 * 86400)
    again = server.run(command)
    assert "up to date" in again.output
    check_completed(place, again, expected)

"""Whatever bytes a file has: it is read, or it is refused as damaged; nothing else, and never much memory."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from sa3_convert.cli.inspection_tables import render_storage as render
from sa3_convert.errors import ModelFileError, UsageError
from sa3_convert.mnn.file.dequantise import dequantised_weight
from sa3_convert.mnn.file.flatbuffer import weight_path
from sa3_convert.mnn.file.storage import content_digest, read_storage
from tests.mnn.constants import constant_values
from tests.mnn.converted import Converter, gaussian, linear_graph, mixed_graph

Damage = Callable[[bytearray], None]

HOSTILE = [0, 1, 3, 4, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC, 1 << 24, 1 << 28]
fast = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def seeds(converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("graphs")
    mixed = mixed_graph(folder / "mixed.onnx", shrink=4)
    weight = gaussian(32, 32)
    linear = linear_graph(folder / "linear.onnx", weight)
    weight[np.random.default_rng(1).random(weight.shape) < 0.95] = 0
    sparse = linear_graph(folder / "sparse.onnx", weight)
    block = ("--weightQuantBits", "4", "--weightQuantBlock", "16")
    return [
        converter(mixed),
        converter(mixed, "--fp16"),
        converter(mixed, *block),
        converter(linear, *block, "--weightQuantScaleBit", "16"),
        converter(linear, "--weightQuantBits", "3", "--saveExternalData=1"),
        converter(sparse, "--detectSparseSpeedUp"),
        converter(sparse, "--weightQuantBits", "4", "--detectSparseSpeedUp"),
    ]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory, seeds: list[Path]) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for seed in seeds:
        if weight_path(seed).exists():
            weight_path(folder / "damaged.mnn").write_bytes(weight_path(seed).read_bytes())
    return folder / "damaged.mnn"


def use(path: Path, *, show: bool = True) -> bool:
    """Do everything there is to do with a file; return whether it was taken for a model.

    Args:
        path: the file.
        show: whether to do what takes longest too: lay out tables, and hash.

    """
    try:
        storage = read_storage(path)
    except ModelFileError:
        return False
    json.loads(storage.to_json())
    for operator, _ in storage.weighted():
        try:
            dequantised_weight(path, operator.name, storage=storage)
        except (ModelFileError, UsageError):
            continue
    for constant in storage.constants:
        try:
            constant_values(path, constant.name, storage=storage)
        except ModelFileError:
            continue
    if show:
        content_digest(path)
        with Console(width=80, quiet=True) as console:
            console.print(render(storage))
    return True


def test_the_seeds_themselves_are_models(seeds: list[Path]) -> None:
    assert all(use(seed) for seed in seeds)


@fast
@given(data=st.binary(max_size=400))
def test_random_bytes_are_no_crash(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    use(scratch)


@fast
@given(seed=st.integers(0, 6), share=st.floats(0, 1))
def test_truncated_models_are_refused(scratch: Path, seeds: list[Path], seed: int, share: float) -> None:
    data = seeds[seed].read_bytes()
    # A file ends with up to seven bytes that only fill it up to a multiple of eight.
    scratch.write_bytes(data[: int(share * (len(data) - 8))])
    assert not use(scratch)


@fast
@given(seed=st.integers(0, 6), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bytes_are_no_crash(
    scratch: Path, seeds: list[Path], seed: int, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(seeds[seed].read_bytes())
    for where, mask in flips:
        data[int(where * (len(data) - 1))] ^= mask
    scratch.write_bytes(data)
    use(scratch)


@fast
@given(
    seed=st.integers(0, 6),
    words=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(HOSTILE)), min_size=1, max_size=4),
)
def test_hostile_offsets_and_lengths_are_no_crash(
    scratch: Path, seeds: list[Path], seed: int, words: list[tuple[float, int]]
) -> None:
    data = bytearray(seeds[seed].read_bytes())
    for where, word in words:
        at = int(where * (len(data) // 4 - 1)) * 4
        data[at : at + 4] = word.to_bytes(4, "little")
    scratch.write_bytes(data)
    use(scratch)


@fast
@given(seed=st.integers(0, 6), source=st.floats(0, 1), target=st.floats(0, 1), words=st.integers(1, 64))
def test_copied_pieces_which_make_offsets_share_and_loop_are_no_crash(
    scratch: Path, seeds: list[Path], seed: int, source: float, target: float, words: int
) -> None:
    data = bytearray(seeds[seed].read_bytes())
    start, end = (int(where * (len(data) // 4 - words)) * 4 for where in (source, target))
    data[end : end + 4 * words] = data[start : start + 4 * words]
    scratch.write_bytes(data)
    use(scratch)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files_are_no_crash(scratch: Path, seeds: list[Path]) -> None:
    """With room for 1 GiB more than before, so that a large allocation fails as such."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        rng = np.random.default_rng(0)
        originals = [seed.read_bytes() for seed in seeds]
        outcomes = [0, 0]
        for case in range(100_000):
            data = bytearray(originals[case % len(originals)])
            damage(rng, case // len(originals) % 4, data)
            scratch.write_bytes(data)
            outcomes[use(scratch, show=case % 50 == 0)] += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert min(outcomes) > 10_000


def damage(rng: np.random.Generator, kind: int, data: bytearray) -> None:
    """Damage a file in place: flip bytes, plant words, copy pieces, or cut it off and fill it up with noise."""
    count = int(rng.integers(1, 6))
    if kind == 0:
        for at in rng.integers(0, len(data), count):
            data[at] ^= int(rng.integers(1, 256))
    elif kind == 1:
        for at in rng.integers(0, len(data) // 4, count):
            data[4 * at : 4 * at + 4] = int(rng.choice(HOSTILE)).to_bytes(4, "little")
    elif kind == 2:
        size = 4 * int(rng.integers(1, 65))
        start, end = (4 * int(at) for at in rng.integers(0, (len(data) - size) // 4, 2))
        data[end : end + size] = data[start : start + size]
    else:
        cut = int(rng.integers(0, len(data)))
        data[cut:] = rng.bytes(len(data) - cut) if rng.random() < 0.5 else b""

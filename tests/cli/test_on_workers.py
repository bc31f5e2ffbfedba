"""Commands on the workers of a scheduler that somebody started, and two of them at once."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from tests.clusters import ADDRESS, cluster

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow

THERE = ("--scheduler", ADDRESS)


@pytest.fixture(scope="module", autouse=True)
def scheduler() -> Iterator[None]:
    """Keep one cluster for all: its workers go from one kind of work to the next."""
    with cluster("--resources", "memory=8e9", workers=2):
        yield


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def batch_in(folder: Path, count: int) -> Path:
    file = folder / "batch.jsonl"
    lines = [{"prompt": "pad", "seconds": 0.5, "steps": 1, "seed": seed} for seed in range(count)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_batch(toy_int8: Bundle, tmp_path: Path) -> None:
    words = ["run", str(toy_int8.path), "--batch", str(batch_in(tmp_path, 4)), "--engine", "mnn", "--threads", "1"]
    assert cli.run([*words, "-o", str(tmp_path / "here")]) == 0
    assert cli.run([*words, "-o", str(tmp_path / "there"), *THERE]) == 0
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    assert here.keys() == there.keys()
    assert len(here) == 5
    assert all(there[name] == audio for name, audio in here.items() if name.endswith(".wav"))


def test_a_full_verification(toy_int8: Bundle, tmp_path: Path) -> None:
    chosen = ["--quick", "--prompts", "0,4", "--seeds", "1", "--seconds", "0.5,1", "--steps", "2", "--threads", "1"]
    for where, more in (("here", ()), ("there", THERE)):
        kept = ["--references", str(tmp_path / f"{where}-references"), "--json", str(tmp_path / f"{where}.json")]
        assert cli.run(["verify", "--full", str(toy_int8.path), *chosen, *kept, *more]) == 0
    here, there = (json.loads((tmp_path / f"{where}.json").read_text()) for where in ("here", "there"))
    assert here == there
    assert here["end_to_end"]["cases"]
    assert content(tmp_path / "here-references") == content(tmp_path / "there-references")


def test_a_plan(toy: Path, tmp_path: Path) -> None:
    words = ["plan", str(toy), "--component", "number_conditioner", "--target-mib", "0.03", "--threads", "1"]
    for where, more in (("here", ()), ("there", THERE)):
        assert cli.run([*words, "--out", str(tmp_path / where / "planned.yaml"), *more]) == 0
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_of_two_batches_into_one_folder_none_spoils_the_other(toy_int8: Bundle, tmp_path: Path) -> None:
    file, out = batch_in(tmp_path, 4), tmp_path / "out"
    words = ["run", str(toy_int8.path), "--batch", str(file), "--engine", "mnn", "-o", str(out), "--workers", "2"]
    both = [
        subprocess.Popen([sys.executable, "-m", "sa3_convert", *words], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = sorted((process.communicate(timeout=600)[1], process.returncode) for process in both)
    codes = sorted(code for _, code in ended)
    # One that comes when the other is done finds all of it.
    assert codes in ([0, 0], [0, 2])
    assert all("Another batch is writing into" in said for said, code in ended if code == 2)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(result["line"] for result in results) == [1, 2, 3, 4]
    hashes = {result["output"]: result["file_sha256"] for result in results}
    assert {file.name for file in out.iterdir()} == {"results.jsonl", *hashes}
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in hashes.items())

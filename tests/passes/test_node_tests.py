"""Every one of ONNX's node tests through reader, lint, converter and MNN, held to what is kept beside this.

`node_tests.txt` has a line per test, with the verdict on each of its forms (see `node_tests`):

    lint       refused by the hazard lint
    reader     refused before that: an input of a type that MNN does not have, or no graph of tensors
    converter  MNN's converter wrote no file, or one with another interface, or the loader refused it
    session    loaded, and refused to run or to return something
    right      computed what ONNX expects
    died       ended its process
    wrong      computed something else, without a word

`python -m tests.passes.test_node_tests` writes it anew; look at what changed. With `--without-lint` it only counts what
MNN makes of the tests that the lint refuses.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.passes.node_tests import FORMS, judged, write_cases

KEPT = Path(__file__).with_name("node_tests.txt")
FEW = ("abs", "less", "gemm", "reduce_log_sum", "scatternd")


def lines_of(verdicts: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return a line per test: its name and a verdict per form, "-" for a form that it does not have."""
    names = sorted({name.rpartition(".")[0] for name in verdicts})
    return [" ".join([name, *(verdicts.get(f"{name}.{form}", ("-", ""))[0] for form in FORMS)]) for name in names]


def test_some_node_tests_come_out_as_kept(tmp_path: Path) -> None:
    found = judged(write_cases(tmp_path, FEW))
    assert len(found) > 50
    assert set(lines_of(found)) <= set(KEPT.read_text().splitlines())


def test_what_is_kept_has_nothing_that_is_silently_wrong() -> None:
    counts = Counter(verdict for line in KEPT.read_text().splitlines() for verdict in line.split()[1:])
    assert not counts.keys() & {"wrong", "died", "bug"}
    assert counts["right"] > 1000


@pytest.mark.slow
def test_every_node_test_comes_out_as_kept(tmp_path: Path) -> None:
    found = judged(write_cases(tmp_path))
    assert {name: why for name, (verdict, why) in found.items() if verdict in ("wrong", "died", "bug")} == {}
    assert lines_of(found) == KEPT.read_text().splitlines()


def _main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cases = write_cases(Path(folder))
        found = judged(cases)
        if arguments != ["--without-lint"]:
            KEPT.write_text("\n".join(lines_of(found)) + "\n")
            return
        refused = [case for case in cases if found[case.name][0] == "lint"]
        sys.stdout.write(f"{Counter(verdict for verdict, _ in judged(refused, lint=False).values())}\n")


if __name__ == "__main__":
    _main(sys.argv[1:])

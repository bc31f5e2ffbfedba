"""What a stage depends on is found in the code itself: a change of meaning counts where it is reached, nothing else."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sa3_convert.convert.code_digest import PACKAGE, KeptDigests, Source, code_digest
from sa3_convert.convert.stages import STAGES
from sa3_convert.convert.work import verify_stage

ALL = set(STAGES)


def stage_digests(package: Path) -> dict[str, str]:
    source = Source(package)
    return {
        name: source.reached([("sa3_convert.convert.work", stage.work.__name__)]).digest()
        for name, stage in STAGES.items()
    }


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return stage_digests(PACKAGE)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, free to be edited."""
    return Path(shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")))


def edit(file: Path, pattern: str, by: str) -> None:
    text, count = re.subn(pattern, by, file.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, f"{pattern} is not in {file}"
    file.write_text(text)


def changed(before: dict[str, str], package: Path) -> set[str]:
    after = stage_digests(package)
    return {name for name in STAGES if before[name] != after[name]}


STORED = {"mnn", "verify", "split", "slots"}
"""Stages that spell a graph for MNN: one of them to emulate it in half arithmetic."""
HALVES = {"onnx-fp16", "onnx-fp16-slots"}
JUDGING = {"verify", "ort-int8", "split", "slots", "ort-int8-slots"} | HALVES
"""Stages that compare a model with its reference."""
INTEGERS = {"ort-int8", "ort-int8-slots"}
EXPORTING = {"export", "export-slots"}


def test_every_stage_is_followed() -> None:
    assert {stage.work.__module__ for stage in STAGES.values()} == {"sa3_convert.convert.work"}


@pytest.mark.parametrize(
    ("file", "pattern", "by", "stages"),
    [
        # The last rule that matches decides; now the first one would.
        ("recipe.py", r"for rule in self\.layers:", "for rule in self.layers[::-1]:", STORED | {"round"}),
        (
            "runtime/sampling.py",
            r"logsnr = end - ",
            r"\g<0>1 - ",
            JUDGING | {"round"},
        ),
        ("passes/fp16_safe.py", r"^_LARGEST_CONSTANT.*= ", r"\g<0>1 + ", STORED),
        ("passes/pipeline.py", r"^_EXTERNAL_FROM_BYTES.*= ", r"\g<0>1 + ", STORED | INTEGERS | HALVES),
        ("passes/half.py", r"^def pass_through.*\n", r"\g<0>    print()\n", {"verify", "split"}),
        ("mnn/worker.py", r"^def _refuse.*\n", r"\g<0>    print()\n", {"mnn", "split", "slots"}),
        ("networks/layers.py", r"^MASKED.*= ", r"\g<0>1 + ", EXPORTING | {"round"}),
        ("checkpoint/lora.py", r"^_NORM_EPS.*= ", r"\g<0>1 + ", EXPORTING | {"round"}),
        ("passes/integers.py", r"^FLOORS_DB.*\n", r"\g<0>    **{},\n", INTEGERS),
        ("check/metrics.py", r"^MAX_DB.*= ", r"\g<0>1 + ", JUDGING),
        ("runtime/sessions.py", r"^class SplitSession.*\n", r"\g<0>    odd = 1\n", {"split"} | INTEGERS),
        ("convert/work.py", r"quick=True", "quick=False", JUDGING),
    ],
)
def test_a_change_of_meaning_redoes_what_depends_on_it_and_nothing_else(
    before: dict[str, str], package: Path, file: str, pattern: str, by: str, stages: set[str]
) -> None:
    edit(package / file, pattern, by)
    assert changed(before, package) == stages


@pytest.mark.parametrize(
    ("file", "pattern", "by"),
    [
        ("bundle/table.py", r"^class _Seconds.*\n", r"\g<0>    odd = 1\n"),
        ("cli/console.py", r"^_PIPED_WIDTH = 140", "_PIPED_WIDTH = 141"),
        ("cli/app.py", r"\Z", "\nprint()\n"),
        ("convert/stages.py", r"StageCost\(23", "StageCost(24"),
        ("errors.py", r"exit_code = 6", "exit_code = 9"),
    ],
)
def test_what_no_stage_reaches_redoes_nothing(
    before: dict[str, str], package: Path, file: str, pattern: str, by: str
) -> None:
    edit(package / file, pattern, by)
    assert changed(before, package) == set()


def test_comments_docstrings_and_layout_redo_nothing_wherever_they_are(before: dict[str, str], package: Path) -> None:
    for file in package.rglob("*.py"):
        text = file.read_text()
        file.write_text("# Another comment.\n\n" + re.sub(r'"""(?=[A-Z])', '"""Also: ', text) + "\n# The end.\n")
    assert changed(before, package) == set()


def test_a_moved_entry_is_refused_rather_than_hashed_as_nothing() -> None:
    with pytest.raises(LookupError, match=r"sa3_convert\.convert\.work has no old_name"):
        Source(PACKAGE).reached([("sa3_convert.convert.work", "old_name")])


MODULES = {
    "__init__": "",
    "start": "from small.plain import helper\n\ndef start():\n    return helper()\n",
    "plain": "VALUE = 1\n\ndef helper():\n    return VALUE\n\ndef other():\n    return 2\n",
    "spare": "VALUE = 1\n\ndef helper():\n    return VALUE\n",
}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., str]:
    """Write a package of a few lines and return the digest of what its function depends on."""

    def digest(**modules: str) -> str:
        package = tmp_path / "small"
        shutil.rmtree(package, ignore_errors=True)
        for name, text in (MODULES | modules).items():
            file = package / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return Source(package).reached([("small.start", "start")]).digest()

    return digest


IMPORT = "from small.plain import helper\n\n"
TYPE_ONLY = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from small.plain import helper\n\n"
CALL = "def start():\n    return helper()\n"


@pytest.mark.parametrize(
    "start",
    [
        IMPORT + CALL,
        "from small.plain import helper as h\n\ndef start():\n    return h()\n",
        "from .plain import helper\n\n" + CALL,
        "from small.plain import *\n\n" + CALL,
        "import small.plain\n\ndef start():\n    return small.plain.helper()\n",
        "from small import plain\n\ndef start():\n    return plain.helper()\n",
        "def start():\n    from small.plain import helper\n    return helper()\n",
        "def start():\n    import small.plain as p\n    return p.helper()\n",
        "try:\n    from small.plain import helper\nexcept ImportError:\n    helper = None\n\n" + CALL,
        IMPORT + "def start(call=helper):\n    return call()\n",
        IMPORT + "TABLE = {'a': helper}\n\ndef start():\n    return TABLE['a']()\n",
        IMPORT + "ONE, TWO = helper, 2\n\ndef start():\n    return ONE()\n",
        IMPORT + "if True:\n    ONE = helper\n\ndef start():\n    return ONE()\n",
        IMPORT + "class A:\n    def run(self):\n        helper()\n\ndef start(a: A):\n    return a.run()\n",
        TYPE_ONLY + "def start(a: 'helper'):\n    pass\n",
        TYPE_ONLY + "def start() -> list['helper']:\n    pass\n",
        "import sys\n\nCOMMAND = (sys.executable, '-m', 'small.plain')\n\ndef start():\n    return COMMAND\n",
        "import small.plain\n\nTABLE = {}\nTABLE.update(small.plain.helper())\n\ndef start():\n    return TABLE\n",
    ],
)
def test_every_way_to_name_something_is_followed_to_its_constants(small: Callable[..., str], start: str) -> None:
    first = small(start=start)
    assert small(start=start, plain=MODULES["plain"].replace("VALUE = 1", "VALUE = 2")) != first
    assert small(start=start, plain=MODULES["plain"].replace("\n\n", "\n\n\n# A comment.\n")) == first


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("plain", "VALUE = 1\n\ndef helper():\n    return -VALUE\n"),
        ("plain", "VALUE = 1.0\n\ndef helper():\n    return VALUE\n"),
        ("plain", "VALUE = True\n\ndef helper():\n    return VALUE\n"),
        ("plain", "VALUE = '1'\n\ndef helper():\n    return VALUE\n"),
        ("plain", "from small.spare import VALUE\n\ndef helper():\n    return VALUE\n"),
        ("plain", "from math import pi as VALUE\n\ndef helper():\n    return VALUE\n"),
        ("plain", "VALUE = 1\nVALUE += 1\n\ndef helper():\n    return VALUE\n"),
        ("plain", "import sys\nsys.setrecursionlimit(9)\nVALUE = 1\n\ndef helper():\n    return VALUE\n"),
        ("__init__", "import os\n\nos.environ['SMALL'] = '1'\n"),
        ("plain", "import small.spare\n\nVALUE = 1\n\ndef helper():\n    return VALUE and small\n"),
        ("start", "from small.spare import helper\n\ndef start():\n    return helper()\n"),
        ("start", "import numpy as np\nfrom small.plain import helper\n\ndef start():\n    return np and helper()\n"),
    ],
)
def test_another_meaning_is_another_digest(small: Callable[..., str], module: str, text: str) -> None:
    assert small(**{module: text}) != small()


def test_the_same_name_from_elsewhere_is_another_digest(small: Callable[..., str]) -> None:
    start = "{first} import pi as A\n{second} import pi as B\n\ndef start():\n    return A - 2 * B\n"
    digests = {
        small(start=start.format(first=f"from {first}", second=f"from {second}"))
        for first, second in (("math", "numpy"), ("numpy", "math"))
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    "plain",
    [
        MODULES["plain"].replace("return 2", "return 3"),
        MODULES["plain"].replace("def helper():", 'def helper():\n    """Return it."""'),
        MODULES["plain"].replace("VALUE = 1\n", 'VALUE = 1\n"""What it is."""\n'),
        MODULES["plain"].replace("VALUE = 1\n", "UNUSED = 3\nVALUE = (\n    1  # one\n)\n"),
        MODULES["plain"] + "\nif __name__ == '__main__':\n    print(helper())\n",
    ],
)
def test_what_is_not_reached_or_has_no_meaning_is_the_same_digest(small: Callable[..., str], plain: str) -> None:
    assert small(plain=plain) == small()


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "code.json"


def test_digests_are_kept_until_a_source_file_changes(
    package: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ("sa3_convert.convert.work", "ort_int8_stage")
    first = KeptDigests(package, kept).of(start)
    with monkeypatch.context() as patch:
        patch.setattr(Source, "reached", lambda *_: pytest.fail("worked out again"))
        assert KeptDigests(package, kept).of(start) == first
    edit(package / "passes/integers.py", r"^FLOORS_DB.*\n", r"\g<0>    **{},\n")
    assert KeptDigests(package, kept).of(start) != first


def test_kept_digests_that_were_damaged_are_worked_out_again(kept: Path) -> None:
    start = ("sa3_convert.errors", "UsageError")
    first = KeptDigests(PACKAGE, kept).of(start)
    text = kept.read_text()
    damaged = [text.replace(first, "0" * 64), text.replace("}", ""), "", "[]", "3", '{"digests": 3}', "[" * 100_000]
    for content in damaged:
        kept.write_text(content)
        assert KeptDigests(PACKAGE, kept).of(start) == first
        assert kept.read_text() == text
    kept.unlink()
    kept.mkdir()
    assert KeptDigests(PACKAGE, kept).of(start) == first


def test_the_digest_of_a_function_is_that_of_its_name() -> None:
    expected = Source(PACKAGE).reached([("sa3_convert.convert.work", "verify_stage")]).digest()
    assert code_digest(verify_stage) == expected

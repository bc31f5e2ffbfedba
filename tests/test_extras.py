"""The extras of the package: what each brings is what its rooms import, and a missing one is named."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.app import _extra_with
from tests.test_house import SOURCE, imports_of, modules, room_of

PROJECT = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {"pyyaml": "yaml", "nvidia-ml-py": "pynvml", "onnx-graphsurgeon": "onnx_graphsurgeon", "onnx-ir": "onnx_ir"}
"""Where a module is not called as what brings it."""
BROUGHT = {
    "_tools": "mnn",
    "google": "onnx",
    "httpx2": "huggingface_hub",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
    "sympy": "torch",
}
"""Modules that another package of ours always brings."""


def brought_by(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in requirements}
    modules = {MODULES.get(name, name) for name in names}
    return modules | {module for module, owner in BROUGHT.items() if owner in modules}


CORE = brought_by([*PROJECT["dependencies"], *EXTRAS["convert"], *EXTRAS["gpu"]])
LAB = brought_by(EXTRAS["lab"])
REQUIRES = [f"{name}; extra == '{extra}'" for extra, names in EXTRAS.items() for name in names]
"""As the metadata of an installed package has them."""


def third_party(path: Path) -> Iterator[str]:
    for name in imports_of(path):
        package = name.partition(".")[0]
        if package != "sa3_convert" and package not in sys.stdlib_module_names:
            yield package.lower()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_what_its_extra_brings(path: Path) -> None:
    assert set(third_party(path)) <= (CORE | LAB if room_of(path).startswith("lab/") else CORE)


def test_no_package_is_in_two_extras_and_all_has_those_of_users() -> None:
    assert EXTRAS["all"] == ["sa3-convert[convert,lab,gpu]"]
    named = [brought_by(names) for extra, names in EXTRAS.items() if extra != "all"]
    assert sum(map(len, named)) == len(set().union(*named))


def test_every_package_that_is_asked_for_is_pinned() -> None:
    text = (SOURCE.parent / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in text.splitlines() if "==" in line}
    wanted = [name for extra, names in EXTRAS.items() if extra != "all" for name in names] + PROJECT["dependencies"]
    assert {re.split(r"[<>=]", name)[0].lower().replace("_", "-") for name in wanted} <= pinned


BLOCKED = f"""
import importlib.metadata, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].lower() in {sorted(LAB)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
importlib.metadata.requires = lambda name: {REQUIRES!r}
from sa3_convert.cli import main
main(sys.argv[1:])
"""


def run_without_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, check=False)


def test_a_conversion_needs_nothing_of_the_laboratory(toy: Path, cache: Path, toy_int8: Bundle, tmp_path: Path) -> None:
    done = run_without_lab("convert", str(toy), "--out", str(tmp_path / "out"), "--cache", str(cache))
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "out").components == toy_int8.components


def test_a_report_says_which_extra_brings_what_it_lacks(toy_int8: Bundle, tmp_path: Path) -> None:
    done = run_without_lab("verify", str(toy_int8.path), "--report", str(tmp_path / "report"))
    assert done.returncode == 7, done.stderr
    assert "pip install 'sa3-convert[lab]'" in done.stderr
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch.nn", "convert"),
        ("onnx", "convert"),
        ("onnx_ir", "convert"),
        ("onnx_graphsurgeon", "convert"),
        ("huggingface_hub", "convert"),
        ("matplotlib.figure", "lab"),
        ("jinja2", "lab"),
        ("somebody_elses", "all"),
        ("", "all"),
    ],
)
def test_the_extra_is_read_from_the_packages_own_metadata(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    assert _extra_with(module) == extra


def test_a_package_that_is_not_installed_asks_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert _extra_with("torch") == "all"

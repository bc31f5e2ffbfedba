"""The extras of the package: what each brings is what its rooms import, and a missing one is named."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle
from sa3_convert.cli.app import _extra_with, _installs
from sa3_convert.components import Component
from tests.test_house import SOURCE, imports_of, modules, room_of

PROJECT = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {
    "prometheus-client": "prometheus_client",
    "pyyaml": "yaml",
    "nvidia-ml-py": "pynvml",
    "onnx-graphsurgeon": "onnx_graphsurgeon",
    "onnx-ir": "onnx_ir",
}
"""Where a module is not called as what brings it."""
BROUGHT = {
    "_tools": "mnn",
    "google": "onnx",
    "httpx2": "huggingface_hub",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
    "starlette": "fastapi",
    "sympy": "torch",
}
"""Modules that another package of ours always brings."""


def brought_by(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in requirements}
    modules = {MODULES.get(name, name) for name in names}
    return modules | {module for module, owner in BROUGHT.items() if owner in modules}


CORE = brought_by([p for e in ("hub", "check", "convert", "audio", "gpu") for p in EXTRAS[e]] + PROJECT["dependencies"])
LAB = brought_by(EXTRAS["lab"])
SERVE = brought_by(EXTRAS["serve"])
CLUSTER = brought_by(EXTRAS["cluster"])
REQUIRES = [f"{name}; extra == '{extra}'" for extra, names in EXTRAS.items() for name in names]
"""As the metadata of an installed package has them."""


def third_party(path: Path) -> Iterator[str]:
    for name in imports_of(path):
        package = name.partition(".")[0]
        if package != "sa3_convert" and package not in sys.stdlib_module_names:
            yield package.lower()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_what_its_extra_brings(path: Path) -> None:
    room = room_of(path)
    beside = {"serve": LAB | SERVE, "lab/common": LAB | CLUSTER, "scheduling": CLUSTER}
    more = beside.get(room, LAB if room.startswith("lab/") else set())
    assert set(third_party(path)) <= CORE | more


def test_no_package_is_in_two_extras_and_all_has_those_of_users() -> None:
    assert EXTRAS["all"] == ["sa3-convert[convert,lab,serve,cluster,gpu]"]
    named = [brought_by(names) - {"sa3-convert"} for extra, names in EXTRAS.items() if extra != "all"]
    assert sum(map(len, named)) == len(set().union(*named))


def test_every_package_that_is_asked_for_is_pinned() -> None:
    text = (SOURCE.parent / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in text.splitlines() if "==" in line}
    wanted = [name for names in EXTRAS.values() for name in names if not name.startswith("sa3-convert[")]
    wanted += PROJECT["dependencies"]
    assert {re.split(r"[\[<>=]", name)[0].lower().replace("_", "-") for name in wanted} <= pinned


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
    assert re.search(r"pip install .*\[lab\]", done.stderr)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch.nn", "convert"),
        ("safetensors", "all"),
        ("onnx", "check"),
        ("onnx_ir", "check"),
        ("onnxruntime", "check"),
        ("onnx_graphsurgeon", "check"),
        ("huggingface_hub", "hub"),
        ("matplotlib.figure", "lab"),
        ("jinja2", "lab"),
        ("gradio", "serve"),
        ("prometheus_client", "serve"),
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


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'sa3-convert[lab]'"),
        ('{"url": "file:///a%20b/x.whl", "archive_info": {}}', "pip install 'sa3-convert[lab] @ file:///a%20b/x.whl'"),
        ('{"url": "file:///a%20b", "dir_info": {"editable": true}}', "pip install -e '/a b[lab]'"),
        ('{"url": "file:///src", "dir_info": {}}', "pip install 'sa3-convert[lab] @ file:///src'"),
        ("damaged", "pip install 'sa3-convert[lab]'"),
    ],
)
def test_an_extra_is_installed_as_the_package_itself_was(
    origin: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return origin

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert _installs("lab") == command


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a fresh environment that has the wheel with what running a bundle needs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    environment, wheels = folder / "venv", folder / "wheels"
    # A copy, since building leaves its folders beside the sources.
    source = folder / "source"
    kept = shutil.ignore_patterns(".*", "artifacts", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(SOURCE.parent, source, ignore=kept, symlinks=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pinned = ["-c", str(SOURCE.parent / "constraints.txt")]
    subprocess.run([str(python), *pip[1:], "install", *pinned, str(wheel)], check=True)
    # Without what was installed it is whole, too.
    target = [str(python), *pip[1:], "install", "--no-deps", "--target", str(folder / "target"), str(wheel)]
    subprocess.run(target, check=True)
    return python


@pytest.mark.slow
def test_a_wheel_with_base_dependencies_runs_and_measures_a_bundle(
    installed: Path, toy_int8: Bundle, tmp_path: Path
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def said(*words: str, code: int = 0, **more: str) -> str:
        done = subprocess.run(
            [str(installed), "-m", "sa3_convert", *words],
            cwd=tmp_path,
            env=clean | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    bundle = str(toy_int8.path)
    said("run", bundle, "--prompt", "warm pad", "--seconds", "1", "-o", "out.wav")
    assert (tmp_path / "out.wav").stat().st_size > 100_000
    said("inspect", str(toy_int8.file(Component.DIT)))
    assert "small-music" in said("table", bundle)
    said("bench", bundle, "--engine", "mnn", "--seconds", "1", "--repeats", "1", "--steps", "1")
    said("bundle", "export", bundle, "--to", "site")
    assert "The card has no picture" in said("bundle", "card", bundle, "-o", "card.md")
    said("run", "site", "--prompt", "warm pad", "--seconds", "1", "-o", "again.wav")
    assert "everything that the converted models need works" in said("doctor")
    assert "pip install 'sa3-convert[check] @ file://" in said("verify", bundle, code=7)
    assert "pip install 'sa3-convert[convert] @ file://" in said("convert", "nowhere", "--out", "o", code=7)
    target = installed.parents[2] / "target"
    assert (target / "sa3_convert" / "py.typed").is_file()
    assert {f.name for f in (target / "sa3_convert" / "configs").iterdir()} >= {"int8.yaml", "small.yaml"}
    names = {path.name.partition("-")[0] for path in installed.parents[1].rglob("*.dist-info")}
    assert not names & {"torch", "onnx", "onnxruntime"}

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_convert.arrays import Session
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, BundleError, CheckpointError, ModelFileError
from sa3_convert.export.component import export_component
from sa3_convert.mnn.converter import mnn_from_onnx
from sa3_convert.recipe import ComponentRecipe
from sa3_convert.runtime.engines import EngineName, MnnEngine, OnHost, OrtEngine, checkpoint_parts
from sa3_convert.runtime.models import Models
from sa3_convert.system.checked_files import CheckedFile
from sa3_convert.system.machine import default_threads
from tests.runtime.conftest import Parts, StandIn


class FakeEngine(OnHost):
    """Loads stand-ins and counts."""

    name: EngineName = "mnn"
    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.loaded: list[StandIn] = []

    def load(self, component: Component) -> StandIn:
        self.loaded.append(StandIn(component.value, lambda: np.zeros(1)))
        return self.loaded[-1]


def test_a_model_is_freed_after_its_block() -> None:
    engine = FakeEngine()
    with Models(engine).use(Component.DIT) as session:
        assert session is engine.loaded[0]
        assert not engine.loaded[0].closed
    assert engine.loaded[0].closed


def test_a_model_is_freed_when_its_stage_fails() -> None:
    engine = FakeEngine()

    def fail() -> None:
        with Models(engine).use(Component.DIT):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert engine.loaded[0].closed


def test_models_that_are_kept_are_loaded_once_and_freed_at_the_end() -> None:
    engine = FakeEngine()
    models = Models(engine, keep_loaded=True)
    for _ in range(2):
        with models.use(Component.DIT):
            pass
    assert len(engine.loaded) == 1
    assert not engine.loaded[0].closed
    models.close()
    assert engine.loaded[0].closed


def test_a_session_that_needs_no_closing_is_fine(small: Parts) -> None:
    with Models(small.engine).use(Component.NUMBER_CONDITIONER) as session:
        assert not hasattr(session, "close")


@pytest.mark.parametrize("engine", ["mnn", "ort"])
def test_a_component_that_the_bundle_lacks_is_named(small: Parts, engine: str) -> None:
    made = MnnEngine(small.layout, {}) if engine == "mnn" else OrtEngine(small.layout, {})
    with pytest.raises(BundleError, match="component 'encoder'"):
        made.load(Component.ENCODER)


@pytest.mark.parametrize("engine", ["mnn", "ort"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_a_damaged_model_file_is_told(small: Parts, tmp_path: Path, engine: str, content: bytes) -> None:
    path = tmp_path / "dit.model"
    path.write_bytes(content)
    files = {Component.DIT: CheckedFile.read(path)}
    made = MnnEngine(small.layout, files, threads=1) if engine == "mnn" else OrtEngine(small.layout, files)
    with pytest.raises(ModelFileError):
        made.load(Component.DIT)


@pytest.fixture(scope="module")
def converted(small: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[Component, Path]:
    """The number conditioner, which is the quickest to convert, as ONNX and as MNN (`.mnn` beside it)."""
    path = tmp_path_factory.mktemp("models") / "number_conditioner.onnx"
    export_component(small.engine.checkpoint, Component.NUMBER_CONDITIONER, path)
    mnn_from_onnx(path, path.with_suffix(".mnn"), ComponentRecipe(floor_db=100))
    return {Component.NUMBER_CONDITIONER: path}


def test_a_backend_that_is_not_there_is_never_replaced(small: Parts, converted: dict[Component, Path]) -> None:
    files = {component: CheckedFile.read(path.with_suffix(".mnn")) for component, path in converted.items()}
    with pytest.raises(BackendError, match="CUDA"):
        MnnEngine(small.layout, files, backend="cuda").load(Component.NUMBER_CONDITIONER)


def test_all_engines_compute_the_same(small: Parts, converted: dict[Component, Path]) -> None:
    files = {component: CheckedFile.read(path.with_suffix(".mnn")) for component, path in converted.items()}
    feeds = {"seconds": np.array([12.5], np.float32)}
    expected = small.engine.load(Component.NUMBER_CONDITIONER).run(feeds)["embedding"]
    references = {component: CheckedFile.read(path) for component, path in converted.items()}
    for engine in (MnnEngine(small.layout, files, threads=1), OrtEngine(small.layout, references, threads=1)):
        actual = engine.load(Component.NUMBER_CONDITIONER).run(feeds)["embedding"]
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make imports of packages fail, as where they are not installed."""
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] in names:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    for module in [m for m in sys.modules if m == "sa3_convert.ort"]:
        monkeypatch.delitem(sys.modules, module)


def test_a_missing_onnx_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch, small: Parts) -> None:
    hide(monkeypatch, "onnxruntime")
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        OrtEngine(small.layout, {}).load(Component.DIT)


def test_a_missing_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch, small: Parts) -> None:
    hide(monkeypatch, "torch")
    with pytest.raises(BackendError, match="pip install torch"):
        small.engine.load(Component.DIT)


def test_a_torch_session_is_strict_about_its_inputs(small: Parts) -> None:
    session: Session = small.engine.load(Component.NUMBER_CONDITIONER)
    with pytest.raises(ValueError, match="takes seconds"):
        session.run({"second": np.zeros(1, np.float32)})


def test_engines_say_what_they_run_with(small: Parts) -> None:
    mnn = MnnEngine(small.layout, {}, threads=2, memory="low")
    assert mnn.settings == {
        "engine": "mnn",
        "backend": "cpu",
        "threads": 2,
        "memory": "low",
        "precision": "high",
    }
    assert OrtEngine(small.layout, {}, threads=1).settings["engine"] == "onnxruntime"
    assert small.engine.settings["padding"] == "key_mask"


def test_precision_low_is_for_what_is_right_with_it(
    monkeypatch: pytest.MonkeyPatch, small: Parts, tmp_path: Path
) -> None:
    opened: list[tuple[str, str]] = []

    class Opened:
        weight_file_bytes = 0

        def __init__(self, path: Path, **settings: Any) -> None:
            opened.append((path.name, settings["precision"]))

    monkeypatch.setattr("sa3_convert.mnn.session.MnnSession", Opened)
    names = ("dit", "decoder", "prepare", "time", "step")
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    files = {name: CheckedFile.read(tmp_path / name) for name in names}
    whole = {Component.DIT: files["dit"], Component.DECODER: files["decoder"]}
    right = (Component.DECODER,)
    low = MnnEngine(small.layout, whole, precision="low", right_at_low=right)
    for component in whole:
        low.load(component)
    assert opened == [("dit", "normal"), ("decoder", "low")]
    assert low.settings["dit at"] == "normal"
    assert "decoder at" not in low.settings
    opened.clear()
    parts = (files["prepare"], files["time"], files["step"])
    for precision, right in (("low", (Component.DIT,)), ("low", ()), ("high", ())):
        MnnEngine(small.layout, whole, parts=parts, precision=precision, right_at_low=right).load(Component.DIT)  # type: ignore[arg-type]
    levels = [level for _, level in opened]
    assert levels == ["normal", "normal", "low", *["normal"] * 3, *["high"] * 3]


def test_threads_that_nobody_asked_for_are_reported_as_they_are(small: Parts) -> None:
    for engine in (MnnEngine(small.layout, {}), OrtEngine(small.layout, {}), small.engine):
        assert engine.settings["threads"] == default_threads()


def test_a_checkpoint_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        checkpoint_parts(tmp_path / "nothing", {})

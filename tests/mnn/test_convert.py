"""Conversion as a whole: what it makes, that it repeats to the byte, and that failures leave nothing behind."""

import concurrent.futures
import math
import os
import select
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sa3_convert.errors import ConversionError
from sa3_convert.mnn.converter import Converter, mnn_from_onnx
from sa3_convert.mnn.file.storage import read_storage
from sa3_convert.mnn.isolated import WORKER
from sa3_convert.mnn.session import MnnSession
from sa3_convert.mnn.worker import SCRATCH
from sa3_convert.recipe import ComponentRecipe, LayerRule, WeightScheme
from tests.mnn.converted import gaussian, save_graph
from tests.mnn.perceptron import LAYERS, decibels, feeds, reference, write_perceptron

FLOAT = ComponentRecipe(floor_db=100)
HALF = ComponentRecipe(floats="fp16", floor_db=50)
INT8 = ComponentRecipe(weights=WeightScheme(bits=8), floor_db=30)
INT4_HALF = ComponentRecipe(weights=WeightScheme(bits=4, symmetric=True), floats="fp16", floor_db=10)


def with_rules(*rules: LayerRule) -> ComponentRecipe:
    return ComponentRecipe(weights=WeightScheme(bits=8, layers=rules), floor_db=20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_perceptron(tmp_path_factory.mktemp("onnx") / "perceptron.onnx")


def fidelity(source: Path, model: Path, length: int = 9) -> float:
    with MnnSession(model, threads=1) as session:
        return decibels(reference(source, length)["y"], session.run(feeds(length))["y"])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("recipe", "least", "stored"),
    [(FLOAT, 120, "fp32"), (HALF, 55, "fp16"), (INT8, 35, "int8"), (INT4_HALF, 12, "int4")],
    ids=["fp32", "fp16", "int8", "int4"],
)
def test_each_kind_of_recipe_gives_its_storage_and_nothing_but_the_file(
    source: Path, tmp_path: Path, recipe: ComponentRecipe, least: float, stored: str
) -> None:
    mnn_from_onnx(source, tmp_path / "out.mnn", recipe)
    assert names_in(tmp_path) == ["out.mnn"]
    assert {weight.type for _, weight in read_storage(tmp_path / "out.mnn").weighted()} == {stored}
    assert fidelity(source, tmp_path / "out.mnn") > least


def test_links_are_followed_to_the_graph_and_its_weights_and_to_the_model(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "graph.onnx").symlink_to(source)
    (tmp_path / "out.mnn").symlink_to("elsewhere/model.mnn")
    before = os.umask(0o027)
    try:
        mnn_from_onnx(tmp_path / "graph.onnx", tmp_path / "out.mnn", FLOAT)
    finally:
        os.umask(before)
    assert names_in(tmp_path / "elsewhere") == ["model.mnn"]
    assert stat.S_IMODE((tmp_path / "elsewhere" / "model.mnn").stat().st_mode) == 0o640
    assert (tmp_path / "out.mnn").is_symlink()


@pytest.mark.parametrize("recipe", [FLOAT, INT8, INT4_HALF], ids=["fp32", "int8", "two passes"])
def test_the_same_conversion_gives_the_same_bytes(source: Path, tmp_path: Path, recipe: ComponentRecipe) -> None:
    for name in ("one", "two"):
        mnn_from_onnx(source, tmp_path / name / "model.mnn", recipe)
    assert (tmp_path / "one" / "model.mnn").read_bytes() == (tmp_path / "two" / "model.mnn").read_bytes()


def test_other_weights_give_another_identity(source: Path, tmp_path: Path) -> None:
    import MNN

    other = write_perceptron(tmp_path / "other.onnx", seed=1)
    mnn_from_onnx(source, tmp_path / "a.mnn", FLOAT)
    mnn_from_onnx(other, tmp_path / "b.mnn", FLOAT)
    assert MNN.get_model_uuid(str(tmp_path / "a.mnn")) != MNN.get_model_uuid(str(tmp_path / "b.mnn"))


def test_conversions_at_once_into_one_folder_do_not_exchange_weights(tmp_path: Path) -> None:
    sources = [write_perceptron(tmp_path / f"{seed}.onnx", seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: mnn_from_onnx(path, tmp_path / "out" / f"{path.stem}.mnn", INT8), sources))
    assert all(fidelity(path, tmp_path / "out" / f"{path.stem}.mnn") > 30 for path in sources)
    assert names_in(tmp_path / "out") == ["0.mnn", "1.mnn", "2.mnn", "3.mnn"]


def test_a_rule_changes_the_layers_that_it_matches_and_no_other(source: Path, tmp_path: Path) -> None:
    rules = with_rules(LayerRule(match=r"^blocks\.0\.down$", bits=4, block_size=32))
    mnn_from_onnx(source, tmp_path / "out.mnn", rules)
    found = {op.name: (w.type, w.block_size) for op, w in read_storage(tmp_path / "out.mnn").weighted()}
    assert found == {
        f"{LAYERS[0]}__matmul_converted": ("int8", None),
        f"{LAYERS[1]}__matmul_converted": ("int4", 32),
    }


def test_rules_for_layers_cost_no_second_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Sequence[str]] = []
    run = Converter.run

    def counted(converter: Converter, flags: Sequence[str], folder: Path) -> str:
        runs.append(flags)
        return run(converter, flags, folder)

    monkeypatch.setattr(Converter, "run", counted)
    mnn_from_onnx(source, tmp_path / "out.mnn", with_rules(LayerRule(match="up", bits=4)))
    assert len(runs) == 1


def test_a_rule_without_bits_keeps_the_layer_float(source: Path, tmp_path: Path) -> None:
    mnn_from_onnx(source, tmp_path / "out.mnn", with_rules(LayerRule(match="up", bits=None)))
    found = {op.name: w.type for op, w in read_storage(tmp_path / "out.mnn").weighted()}
    assert found == {f"{LAYERS[0]}__matmul_converted": "fp32", f"{LAYERS[1]}__matmul_converted": "int8"}


def test_a_layer_that_a_rule_keeps_float_is_halved_with_the_other_floats(source: Path, tmp_path: Path) -> None:
    recipe = with_rules(LayerRule(match="up", bits=None)).model_copy(update={"floats": "fp16"})
    mnn_from_onnx(source, tmp_path / "out.mnn", recipe)
    found = {op.name: w.type for op, w in read_storage(tmp_path / "out.mnn").weighted()}
    assert found == {f"{LAYERS[0]}__matmul_converted": "fp16", f"{LAYERS[1]}__matmul_converted": "int8"}


def test_a_rule_that_matches_nothing_is_named_with_some_layers(source: Path, tmp_path: Path) -> None:
    rules = with_rules(LayerRule(match="up", bits=4), LayerRule(match="attention", bits=4))
    with pytest.raises(ConversionError, match=r"weights\.layers\[1\]: 'attention' matches none .*blocks\.0\.up"):
        mnn_from_onnx(source, tmp_path / "out.mnn", rules)
    assert names_in(tmp_path) == []


def test_quantised_weights_in_a_graph_without_layers_are_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    path = save_graph(
        tmp_path / "sine.onnx", [helper.make_node("Sin", ["x"], ["y"])], {"x": (TensorProto.FLOAT, [1, 8])}, ["y"], {}
    )
    with pytest.raises(ConversionError, match=r"has no layers with weights.*Leave `weights` out"):
        mnn_from_onnx(path, tmp_path / "out.mnn", INT8)


def test_exact_gelu_stays_exact(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Mul", ["x", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["plus"]),
        helper.make_node("Mul", ["x", "plus"], ["product"]),
        helper.make_node("Mul", ["product", "half"], ["y"]),
    ]
    constants = {
        "root": np.array(np.sqrt(0.5), np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
    }
    path = save_graph(tmp_path / "gelu.onnx", nodes, {"x": (TensorProto.FLOAT, [1, 200])}, ["y"], constants)
    mnn_from_onnx(path, tmp_path / "gelu.mnn", FLOAT)
    x = np.linspace(-4, 4, 200, dtype=np.float32)
    exact = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()])
    result = MnnSession(tmp_path / "gelu.mnn").run({"x": x[None]})["y"][0]
    # The tanh form is off by 5e-4.
    np.testing.assert_allclose(result, exact, rtol=0, atol=5e-5)


def test_the_second_pass_halves_floats_and_keeps_integers(source: Path, tmp_path: Path) -> None:
    mnn_from_onnx(source, tmp_path / "half.mnn", INT8.model_copy(update={"floats": "fp16"}))
    storage = read_storage(tmp_path / "half.mnn")
    assert {weight.type for _, weight in storage.weighted()} == {"int8"}
    assert {constant.type for constant in storage.constants if constant.is_float} == {"fp16"}
    assert fidelity(source, tmp_path / "half.mnn") > 35


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_external_data_that_is_missing_or_short_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_perceptron(tmp_path / "perceptron.onnx")
    data = tmp_path / "perceptron.onnx.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ConversionError, match=r"perceptron\.onnx\.data is (missing|truncated)"):
        mnn_from_onnx(path, tmp_path / "out.mnn", FLOAT)


def worker_that(code: str) -> Converter:
    """Return a stand-in for the worker that runs some code instead; its arguments are in sys.argv."""
    return Converter(command=(sys.executable, "-c", f"import os, signal, sys, time\n{code}"), timeout=20)


SAME_FOR_PORTS = (
    "import subprocess\n"
    "if sys.argv[1] == 'ports': sys.exit(subprocess.run([sys.executable, '-m', 'sa3_convert.mnn.worker', "
    "*sys.argv[1:]]).returncode)\n"
    "target = sys.argv[sys.argv.index('--MNNModel') + 1]\n"
)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('step 7'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGSEGV)", r"SIGSEGV(.|\n)*step 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL.*memory ran out"),
        ("print('no idea'); sys.exit(3)", r"exit status 3(.|\n)*no idea"),
        ("print('Converted Success!')", r"wrote no file(.|\n)*Converted Success!"),
        (SAME_FOR_PORTS + "open(target, 'w')", "wrote an empty file"),
        (SAME_FOR_PORTS + "open(target, 'wb').write(b'x' * 999)", "does not load"),
    ],
)
def test_a_converter_that_dies_or_lies_is_an_error_with_its_last_lines(
    source: Path, tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "out.mnn").write_text("the previous file")
    (tmp_path / "out.mnn.weight").write_text("and its weights")
    with pytest.raises(ConversionError, match=said) as caught:
        mnn_from_onnx(source, tmp_path / "out.mnn", FLOAT, converter=worker_that(code))
    assert caught.value.exit_code == 4
    assert (tmp_path / "out.mnn").read_text() == "the previous file"
    assert names_in(tmp_path) == ["out.mnn", "out.mnn.weight"]


def test_a_converter_that_hangs_is_stopped(source: Path, tmp_path: Path) -> None:
    hanging = Converter(command=(sys.executable, "-c", "import time; time.sleep(600)"), timeout=0.5)
    with pytest.raises(ConversionError, match=r"did not end within 0\.5 seconds"):
        mnn_from_onnx(source, tmp_path / "out.mnn", FLOAT, converter=hanging)
    assert names_in(tmp_path) == []


def test_a_converter_that_cannot_be_started_is_an_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="could not be started"):
        mnn_from_onnx(source, tmp_path / "out.mnn", FLOAT, converter=Converter(command=("/nonexistent/python",)))


def test_a_new_file_replaces_the_old_one_and_its_weights(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.mnn").write_text("old")
    (tmp_path / "out.mnn.weight").write_text("old")
    mnn_from_onnx(source, tmp_path / "out.mnn", FLOAT)
    assert names_in(tmp_path) == ["out.mnn"]


# A converter that keeps the weights outside, as MNN's does above 2000 MB.
OUTSIDE = Converter(
    command=(
        sys.executable,
        "-c",
        "import sys, runpy\n"
        "if sys.argv[1] == 'convert': sys.argv.append('--saveExternalData')\n"
        "runpy.run_module('sa3_convert.mnn.worker', run_name='__main__', alter_sys=True)",
    )
)


@pytest.mark.parametrize("recipe", [FLOAT, INT8, with_rules(LayerRule(match="up", bits=4))])
def test_weights_outside_the_file_come_along(source: Path, tmp_path: Path, recipe: ComponentRecipe) -> None:
    mnn_from_onnx(source, tmp_path / "out.mnn", recipe, converter=OUTSIDE)
    assert names_in(tmp_path) == ["out.mnn", "out.mnn.weight"]
    assert fidelity(source, tmp_path / "out.mnn") > recipe.floor_db * 0.8


def test_two_passes_over_weights_outside_the_file_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="Use `floats: fp32`"):
        mnn_from_onnx(source, tmp_path / "out.mnn", INT4_HALF, converter=OUTSIDE)
    assert names_in(tmp_path) == []


def big_linear(path: Path) -> Path:
    """Write a linear of 4 MiB, so that the converter's scratch file is used."""
    from onnx import TensorProto, helper

    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    return save_graph(path, [node], {"x": (TensorProto.FLOAT, [4, 1024])}, ["y"], {"weight": gaussian(1024, 1024)})


def limited(size: int) -> Converter:
    """Return the worker under a limit on the size of files."""
    return Converter(command=("prlimit", f"--fsize={size}", *WORKER))


@pytest.mark.parametrize("size", [1000, 500_000, 2_000_000])
def test_a_file_that_may_not_grow_further_is_an_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(ConversionError, match="SIGXFSZ"):
        mnn_from_onnx(big_linear(tmp_path / "big.onnx"), tmp_path / "out.mnn", INT8, converter=limited(size))
    assert names_in(tmp_path) == ["big.onnx"]


def on_small_disk(mebibytes: int) -> Converter:
    """Return the worker with its working directory on a disk of its own, which the file it writes is not on."""
    mount = f'mkdir -p disk && mount -t tmpfs -o size={mebibytes}m none disk && cd disk && exec "$@"'
    return Converter(command=("unshare", "-rm", "sh", "-c", mount, "sh", *WORKER))


def test_a_scratch_disk_that_runs_full_is_an_error_although_the_file_looks_whole(tmp_path: Path) -> None:
    source = big_linear(tmp_path / "big.onnx")
    mnn_from_onnx(source, tmp_path / "enough.mnn", INT8, converter=on_small_disk(32))
    with pytest.raises(ConversionError, match="disk is full"):
        mnn_from_onnx(source, tmp_path / "full.mnn", INT8, converter=on_small_disk(3))
    assert names_in(tmp_path) == ["big.onnx", "enough.mnn"]


def test_a_converter_whose_last_words_do_not_fit_on_the_disk_is_told_as_such(tmp_path: Path) -> None:
    source = big_linear(tmp_path / "big.onnx")
    # What Python does at its end when standard output takes no more.
    silenced = Converter(command=("sh", "-c", 'exec "$@" > /dev/full', "sh", sys.executable, "-c", "print('done')"))
    with pytest.raises(ConversionError, match="disk is full"):
        mnn_from_onnx(source, tmp_path / "full.mnn", INT8, converter=silenced)
    assert names_in(tmp_path) == ["big.onnx"]


def test_too_little_disk_is_told_before_anything_starts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConversionError, match="MiB of disk left"):
        mnn_from_onnx(source, tmp_path / "out.mnn", FLOAT)


def test_conversion_needs_no_network(source: Path, tmp_path: Path) -> None:
    """In a network namespace of its own not even the loopback device is up."""
    alone = Converter(command=("unshare", "-rn", *WORKER))
    mnn_from_onnx(source, tmp_path / "out.mnn", INT4_HALF, converter=alone)
    assert fidelity(source, tmp_path / "out.mnn") > 12


def test_conversion_starts_no_program_and_imports_none_of_mnns_wrappers(source: Path, tmp_path: Path) -> None:
    """The wrappers run pip when they are imported."""
    code = (
        "import atexit, runpy, sys\n"
        "started = []\n"
        "kinds = ('socket', 'subprocess', 'os.exec', 'os.posix_spawn', 'os.system', 'os.fork')\n"
        "sys.addaudithook(lambda event, _: started.append(event) if event.startswith(kinds) else None)\n"
        f"log = open({str(tmp_path / 'log')!r}, 'a')\n"
        "def note():\n"
        "    imported = [m for m in sys.modules if m.startswith(('MNN.tools', 'pip', 'onnx', 'torch'))]\n"
        "    print(sys.argv[1], imported, started, file=log)\n"
        "atexit.register(note)\n"
        "runpy.run_module('sa3_convert.mnn.worker', run_name='__main__', alter_sys=True)"
    )
    mnn_from_onnx(source, tmp_path / "out.mnn", INT4_HALF, converter=Converter(command=(sys.executable, "-c", code)))
    assert (tmp_path / "log").read_text().splitlines() == ["convert [] []", "convert [] []", "ports [] []"]


@pytest.mark.parametrize(
    "attempt",
    ["import subprocess; subprocess.run(['true'])", "import os; os.system('true')", "import socket; "
     "socket.create_connection(('localhost', 9))"],
)  # fmt: skip
def test_the_worker_cannot_start_programs_or_reach_a_network(attempt: str) -> None:
    code = f"import sys; from sa3_convert.mnn import worker; sys.addaudithook(worker._refuse); {attempt}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "PermissionError: conversion tried" in done.stderr


def test_the_worker_sees_nothing_of_the_users_environment(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    # But how threads wait, which the user may know better.
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    code = f"print(sorted(os.environ), os.getcwd(), file=open({str(tmp_path / 'log')!r}, 'w'))"
    with pytest.raises(ConversionError, match="wrote no file"):
        mnn_from_onnx(source, tmp_path / "out.mnn", FLOAT, converter=worker_that(code))
    seen = (tmp_path / "log").read_text()
    assert "HF_TOKEN" not in seen
    assert "PROXY" not in seen
    assert "GOMP_SPINCOUNT" in seen
    assert f"{tmp_path}/.out.mnn." in seen


def test_the_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    child = (
        "from sa3_convert.mnn import worker\n"
        "worker._convert = lambda flags: print('up', flush=True) or input()\n"
        "worker.main(['convert'])"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.kill()
    # The child holds the other end of the pipe, and its input stays open: the end comes only with its own.
    ended, _, _ = select.select([process.stdout], [], [], 30)
    process.communicate()
    assert ended


def test_the_scratch_file_still_has_the_name_that_the_worker_watches(tmp_path: Path) -> None:
    """If MNN renames it, a full disk goes unnoticed again."""
    import _tools

    assert SCRATCH.encode() in Path(_tools.__file__).read_bytes()

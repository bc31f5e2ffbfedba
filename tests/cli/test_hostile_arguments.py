"""Every value of every parameter of every command, whatever it is: work, or one sentence; never a bug report.

Commands and parameters are asked of the app, so what is added is covered. The work itself is left out: what is tried
here is all that comes before it. No device and no folder outside of the test's is among the values: a fault would
replace it.
"""

import importlib
import os
import pkgutil
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer

import sa3_convert
import sa3_convert.cli.app as cli
from sa3_convert.bundle.reader import Bundle
from sa3_convert.errors import Sa3Error
from sa3_convert.lab.drift.baseline import read_baseline, write_baseline
from sa3_convert.lab.drift.drift import key_of

ODD = (
    *("", "folder", "missing", "garbage", "empty", "some.json", "fifo", "loop", "dangling", "garbage/x", "locked"),
    *("x" * 5000, "a\nb", os.fsdecode(b"\xff"), "\x1b[31m", "a:b", "=", ",", "@", "日本"),
    *("0", "-1", "nan", "inf", "-inf", "1e308", "1e999", "9" * 400, "1:nan", "nan:1", "1,nan", "prompt=1 seed=x"),
)
"""What is given for each parameter, be it a path, a number, a name or a list."""

WORK = (
    "sa3_convert.export.component.export_component",
    "sa3_convert.mnn.converter.mnn_from_onnx",
    "sa3_convert.mnn.file.storage.read_storage",
    "sa3_convert.passes.pipeline.onnx_for_mnn",
    "sa3_convert.check.bundle.verify_bundle",
    "sa3_convert.lab.generations.full.verify_fully",
    "sa3_convert.lab.bisect.bisect.bisect_bundle",
    "sa3_convert.lab.bisect.bisect.bisect_bundle_against",
    "sa3_convert.lab.generations.trajectory.case_feeds",
    "sa3_convert.lab.drift.drift.check_drift",
    "sa3_convert.lab.drift.drift.update_baseline",
    "sa3_convert.runtime.pipeline.Pipeline.stream",
    "sa3_convert.lab.bench.bench",
    "sa3_convert.lab.doctor.examine.diagnose",
    "sa3_convert.lab.selftest.selftest",
    "sa3_convert.checkpoint.hub.fetch",
    "sa3_convert.lab.miniature.train.train",
    "sa3_convert.serve.server.serve",
)


class WorkedError(Sa3Error):
    """The command has taken its arguments and begins to work."""

    exit_code = 0


def commands() -> dict[str, Any]:
    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, (*path, name))
        else:
            yield " ".join(path), command

    return dict(walk(typer.main.get_command(cli.app), ()))


COMMANDS = commands()
SOUND = {
    "convert": (["CHECKPOINT"], {"--out": "out", "--dry-run": None}),
    "export": (["CHECKPOINT"], {"--component": "number_conditioner", "--out": "o.onnx"}),
    "fuse": (["some.onnx"], {"--component": "number_conditioner", "--out": "f.onnx"}),
    "mnn": (["some.onnx"], {"--component": "number_conditioner", "--out": "m.mnn"}),
    "plan": (["CHECKPOINT"], {"--component": "dit", "--out": "p.yaml", "--target-mib": "1", "--dry-run": None}),
    "sweep": (["CHECKPOINT"], {"--recipe": "int8", "--out": "sweep", "--dry-run": None}),
    "verify": (["BUNDLE"], {}),
    "bisect": (["BUNDLE"], {"--component": "number_conditioner"}),
    "inspect": (["BUNDLE/dit.mnn"], {}),
    "table": (["BUNDLE"], {}),
    "drift": (["BUNDLE"], {"--baseline": "BASELINE"}),
    "run": (["BUNDLE"], {"-o": "o.wav", "--prompt": "x", "--seconds": "0.3", "--steps": "1"}),
    "serve": (["BUNDLE"], {}),
    "bench": (["BUNDLE"], {}),
    "doctor": ([], {}),
    "selftest": ([], {}),
    "checkpoint synthesize": (["synthesized"], {"--size": "toy"}),
    "checkpoint train-miniature": (["trained"], {"--quick": None}),
    "checkpoint fetch": (["someone/something", "downloaded"], {}),
    "bundle export": (["BUNDLE"], {"--to": "site"}),
    "bundle card": (["BUNDLE"], {"--out": "card.md"}),
    "bundle publish": (["BUNDLE"], {"--to": "someone/models", "--allow": "synthetic", "--dry-run": None}),
}
"""Arguments of each command that are right."""


def takes_value(parameter: Any) -> bool:
    return parameter.name != "help" and not parameter.secondary_opts and parameter.bare_type is not bool


def tries() -> Iterator[tuple[str, str]]:
    for name, command in COMMANDS.items():
        yield from ((name, parameter.name) for parameter in command.params if takes_value(parameter))


def arguments_with(name: str, parameter_name: str, value: str) -> list[str]:
    """Return a command's right arguments but for one that is `value`."""
    positional, options = SOUND[name]
    parameters = COMMANDS[name].params
    places = [parameter.name for parameter in parameters if parameter.param_type_name == "argument"]
    positional = [value if place == parameter_name else given for place, given in zip(places, positional, strict=True)]
    chosen = dict(options)
    for parameter in parameters:
        if parameter.name == parameter_name and parameter_name not in places:
            chosen = {option: given for option, given in chosen.items() if option not in parameter.opts}
            chosen[parameter.opts[-1]] = value
    flags = [
        f"{option}={given}" if option.startswith("--") else option + given
        for option, given in chosen.items()
        if given is not None
    ]
    return [*name.split(), *(option for option, given in chosen.items() if given is None), *flags, "--", *positional]


@pytest.fixture
def place(tmp_path: Path, toy_int8: Bundle, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("garbage").write_bytes(random.Random(0).randbytes(5000))
    Path("empty").touch()
    Path("some.json").write_text('{"a": [1, {"b": null}]}')
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "sum", ports[:1], ports[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), "some.onnx")
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere/x")
    Path("locked").mkdir(mode=0)
    Path("BUNDLE").symlink_to(toy_int8.path)
    Path("CHECKPOINT").symlink_to(toy)
    kept = read_baseline(Path(__file__).parents[1] / "drift.json")
    assert kept is not None
    variant, recipe, size = key_of(toy_int8)
    own = kept.bundles[0].model_copy(update={"variant": variant, "recipe": recipe, "size": size})
    write_baseline(Path("BASELINE"), kept.replacing(own))

    def work(*_: object, **__: object) -> None:
        raise WorkedError("worked")

    # A module that is first imported while another's function is replaced would keep the replacement.
    for module in pkgutil.walk_packages(sa3_convert.__path__, "sa3_convert."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in WORK:
        monkeypatch.setattr(name, work)
    # Somebody reads the pipe: who writes to one that nobody reads waits for a reader, as in any shell.
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    yield tmp_path
    os.close(reader)


class HungError(BaseException):
    """Nothing that a command may catch."""


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def hung(*_: object) -> None:
        raise HungError(f"{arguments} does not end")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(30)
    try:
        code = cli.run(arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, capsys.readouterr().err


def test_the_right_arguments_of_every_command_are_known() -> None:
    assert SOUND.keys() == COMMANDS.keys()


def test_right_arguments_are_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (positional, options) in SOUND.items():
        flags = [word for option, given in options.items() for word in ([option] if given is None else [option, given])]
        code, said = outcome([*name.split(), *flags, *positional], capsys)
        assert code == 0, (name, said)


def complaints(name: str, parameter: str, values: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> list[Any]:
    found = []
    for value in values:
        code, said = outcome(arguments_with(name, parameter, value), capsys)
        if code not in (0, 2, 3, 4, 7) or "Traceback" in said or (code and not said.strip()):
            found.append((value[:20], code, said[-300:]))
    return found


@pytest.mark.parametrize(("name", "parameter"), tries())
def test_an_odd_value_is_never_a_bug(
    name: str, parameter: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = random.Random(f"{name} {parameter}").sample(ODD, 2)
    assert complaints(name, parameter, tuple(values), capsys) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_odd_value_at_all_is_a_bug(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        parameter.name: complaints(name, parameter.name, ODD, capsys)
        for parameter in COMMANDS[name].params
        if takes_value(parameter)
    }
    assert {parameter: faults for parameter, faults in found.items() if faults} == {}

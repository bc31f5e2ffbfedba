"""Models that were changed by someone who also adapted the manifest: every hash is right, and nothing else need be.

`python -m tests.robustness.mutations BUNDLE FOLDER COUNT SEED COMPONENT…` puts that many changed models of these
components through `run` and `verify` (tokenizers through `run`), each command in a process forked from this one, which
has imported what they need. It prints a JSON line per command.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sa3_convert.components import Component
from sa3_convert.errors import Sa3Error
from sa3_convert.mnn.file.flatbuffer import Buffer
from sa3_convert.mnn.file.storage import read_storage

HOSTILE = (0, 1, 2, 3, 7, 255, 4096, 1 << 20, (1 << 30) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 5)
TOKENIZER = "tokenizer"
MODELS = tuple(component.value for component in Component)
UNCHANGED = "nothing"
"""What is changed in the first model: commands that end well on it reach the models of the others too."""
_DEEPEST = 5
_ROOM = 6 << 30
_PATIENCE = 120.0
_PROGRAM = "sa3-convert: "


@dataclass(frozen=True)
class Trial:
    """How one command ended on one changed model."""

    component: str
    number: int
    change: str
    command: str
    code: int | None
    """None: it did not end in time."""
    seconds: float
    problems: tuple[str, ...]
    said: str


# ---- changes


def fields(data: bytes) -> tuple[list[int], list[int]]:
    """Return where fields of tables and items of vectors stand that are no offsets, found without a schema."""
    found: set[int] = set()
    items: set[int] = set()
    seen: set[int] = set()

    def word(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "little")

    def visit(at: int, depth: int) -> bool:
        """Look for a table; tell whether there is one."""
        if at in seen:
            return True
        if depth > _DEEPEST or not 0 <= at <= len(data) - 4:
            return False
        vtable = at - int.from_bytes(data[at : at + 4], "little", signed=True)
        if not 0 <= vtable <= len(data) - 4 or vtable % 2:
            return False
        size = int.from_bytes(data[vtable : vtable + 2], "little")
        if size < 4 or size % 2 or size > 200 or vtable + size > len(data):
            return False
        seen.add(at)
        for slot in range(vtable + 4, vtable + size, 2):
            offset = int.from_bytes(data[slot : slot + 2], "little")
            position = at + offset
            if offset and position + 4 <= len(data) and not leads_on(position, depth):
                found.add(position)
        return True

    def leads_on(position: int, depth: int) -> bool:
        """Tell whether a field refers to a table or a vector, whose items are then found."""
        target = position + word(position)
        if not position < target <= len(data) - 4:
            return False
        if visit(target, depth + 1):
            return True
        count = word(target)
        if not 0 < count < 4096 or target + 4 + 4 * count > len(data):
            return False
        for item in range(target + 4, target + 4 + 4 * min(count, 64), 4):
            if not visit(item + word(item), depth + 1):
                items.add(item)
        return True

    visit(word(0), 0)
    Buffer(data).root()  # it is one
    return sorted(found), sorted(items)


def changed(original: bytes, places: tuple[list[int], list[int]], rng: random.Random) -> tuple[bytes, str]:
    """Return a copy with one to three changes, and what they are."""
    data, said = bytearray(original), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(("word", "word", "step", "step", "item", "item", "copy", "byte", "noise"))
        at = rng.choice(places[kind in ("item", "noise")])
        old = int.from_bytes(data[at : at + 4], "little")
        match kind:
            case "word":
                new = rng.choice(HOSTILE)
            case "step" | "item":
                new = rng.choice((old + 1, old - 1, 2 * old, old // 2, -old, old ^ 1 << rng.randrange(32)))
            case "copy":
                other = rng.choice(places[0])
                new = int.from_bytes(data[other : other + 4], "little")
            case "byte":
                at = rng.randrange(len(data) - 4)
                new = int.from_bytes(data[at : at + 4], "little") ^ 1 << rng.randrange(8)
            case _:
                size = rng.choice((4, 16, 64))
                data[at : at + size] = rng.randbytes(len(data[at : at + size]))
                said.append(f"{size} bytes of noise at {at}")
                continue
        data[at : at + 4] = (new % (1 << 32)).to_bytes(4, "little")
        said.append(f"{kind} at {at}: {old} to {new % (1 << 32)}")
    return bytes(data), "; ".join(said)


NODES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1 << 31, 1 << 33, 1.5, 1e308, "", "(", "(a+)+$", "a\0b", "nope", "a" * 100_000, [], {}, [[]]),
    {"Regex": "(.+)+!$"},
    {"Regex": ""},
    {"type": "Replace", "pattern": {"Regex": "^|$"}, "content": "ab"},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": True},
    {"type": "FixedLength", "length": 0},
    {"type": "Split", "pattern": {"Regex": "\\b(?=a)"}, "behavior": "MergedWithNext", "invert": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "special_tokens": {}},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1e308], ["b", 1e308]], "byte_fallback": True},
    {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "vocab": {"a": 4_000_000_000}},
    {"id": 1 << 31, "content": "pad", "single_word": False, "lstrip": True, "rstrip": True, "normalized": True},
)
"""Values that stand where no one expects them, and parts of tokenizers that are known for trouble."""


def changed_json(original: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a JSON document with one to three nodes replaced, dropped or added, and what they are."""
    root, said = json.loads(original), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, trail = root, []
        while True:
            key: Any = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            trail.append(str(key))
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
                break
            node = node[key]
        new = rng.choice(NODES)
        if rng.random() < 0.15:
            del node[key]
        elif isinstance(node, list) and rng.random() < 0.5:
            node.insert(key, new)
        else:
            node[key] = new
        said.append(f"{'.'.join(trail)}: {json.dumps(new)[:80]}")
    return json.dumps(root).encode(), "; ".join(said)


def file_name(component: str) -> str:
    return "tokenizer.json" if component == TOKENIZER else f"{component}.mnn"


def place(bundle: Path, folder: Path, component: str, data: bytes, *, audited: bool) -> Path:
    """Put a bundle with one changed model into a folder, its manifest adapted; the other files are the same ones.

    They are hard links: nothing in a bundle is read through a symbolic link that leads out of it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    name = file_name(component)
    others = shutil.ignore_patterns(name, "manifest.json")
    shutil.copytree(bundle, folder, ignore=others, copy_function=os.link)
    (folder / name).write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for artifact in manifest["artifacts"]:
        if artifact["path"] == name:
            artifact |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            if component == TOKENIZER:
                artifact["table"] = None
            if audited and component != TOKENIZER:
                with contextlib.suppress(Sa3Error):
                    artifact["storage"] = read_storage(folder / name).summary()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


# ---- commands


def command(name: str, bundle: Path, component: str, output: Path, audio: Path) -> list[str]:
    """Return the arguments of a command that uses the component's model."""
    if name == "verify":
        return ["verify", str(bundle), "--component", component, "--quick", "--threads", "1"]
    given = ("--init-audio", str(audio)) if component == Component.ENCODER else ()
    settings = ("--prompt", "a warm pad", "--seconds", "0.3", "--steps", "1", "--threads", "1", *given)
    return ["run", str(bundle), *settings, "-o", str(output)]


def run(arguments: Sequence[str], log: Path) -> tuple[int | None, float]:
    """Run the command line in a child; return how it ended, None if it had to be killed, and how long it took."""
    before = time.monotonic()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _ROOM, taken + _ROOM))
        try:
            from sa3_convert.cli import main

            main(arguments)
        except SystemExit as leave:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(leave.code if isinstance(leave.code, int) else 1)
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
            os._exit(99)
    while time.monotonic() - before < _PATIENCE:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), time.monotonic() - before
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, time.monotonic() - before


def problems(name: str, code: int | None, said: str, output: Path) -> Iterator[str]:
    """Yield what breaks a promise."""
    wanted = {"run": (0, 3, 4, 7, 8), "verify": (0, 3, 4, 5, 7)}[name]
    if code is None:
        yield "it did not end"
    elif code not in wanted:
        yield f"exit {code}"
    if "Traceback" in said or "panicked" in said:
        yield "a traceback"
    if code and not any(line.startswith(_PROGRAM) for line in said.splitlines()) and name == "run":
        yield "no word"
    left = sorted(file.name for file in output.parent.iterdir()) if output.parent.is_dir() else []
    if left != ([output.name] if name == "run" and code == 0 else []):
        yield f"left {left}"
    if name == "run" and code == 0 and not np.isfinite(soundfile.read(output)[0]).all():
        yield "audio that is not finite"


def trials(bundle: Path, folder: Path, count: int, seed: int, components: Sequence[str]) -> Iterator[Trial]:
    """Yield two trials per changed model, one per changed tokenizer; `count` changed files over all components."""
    audio, log = folder / "in.wav", folder / "log"
    soundfile.write(audio, np.random.default_rng(0).uniform(-0.5, 0.5, (13230, 2)), 44100)
    originals = {name: (bundle / file_name(name)).read_bytes() for name in components}
    places = {name: fields(data) for name, data in originals.items() if name != TOKENIZER}
    for number in range(seed * count, (seed + 1) * count):
        rng = random.Random(number)
        component = tuple(originals)[number % len(originals)]
        original = originals[component]
        if component == TOKENIZER:
            data, change = changed_json(original, rng)
        elif number == seed * count:
            data, change = original, UNCHANGED
        else:
            data, change = changed(original, places[component], rng)
        there = place(bundle, folder / "bundle", component, data, audited=rng.random() < 0.7)
        for name in ("run",) if component == TOKENIZER else ("run", "verify"):
            output = folder / "out" / "x.wav"
            shutil.rmtree(output.parent, ignore_errors=True)
            output.parent.mkdir()
            code, seconds = run(command(name, there, component, output, audio), log)
            said = log.read_text(errors="replace")
            found = tuple(problems(name, code, said, output))
            yield Trial(component, number, change, name, code, round(seconds, 2), found, said[-600:])


def warm(bundle: Path, folder: Path) -> None:
    """Import here what the commands import, so that each is forked with it."""
    for name in ("run", "verify"):
        list_ = folder / "modules"
        if not (child := os.fork()):
            from sa3_convert.cli.app import run as run_here

            audio = folder / "in.wav"
            soundfile.write(audio, np.zeros((4410, 2)), 44100)
            run_here(command(name, bundle, Component.ENCODER, folder / "warm.wav", audio))
            list_.write_text("\n".join(sys.modules))
            os._exit(0)
        os.waitpid(child, 0)
        for module in list_.read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(module)


def main(arguments: list[str]) -> None:
    bundle, folder = (Path(argument).absolute() for argument in arguments[:2])
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    warm(bundle, folder)
    count, seed = map(int, arguments[2:4])
    for trial in trials(bundle, folder, count, seed, arguments[4:]):
        sys.stdout.write(json.dumps(asdict(trial)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

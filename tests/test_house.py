"""How the package is built: rooms that import one way, files and functions of a size to be read."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "sa3_convert"


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    """Return the folder of a file that holds a subject: `lab/drift`, `mnn`; of one at the top its name, `errors`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "/".join(parts[:2]) if parts[0] == "lab" and len(parts) > 1 else parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere, or names as text, as what starts a process does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                names = [f"{module}.{alias.name}" for alias in node.names]
                inner = [name for name in names if file_of(name) is not None]
                yield from inner
                if len(inner) < len(names):
                    yield module
            case ast.Constant(value=str(text)) if text.startswith("sa3_convert.") and file_of(text) is not None:
                yield text


def file_of(module: str) -> Path | None:
    """Return where a module of the package is."""
    path = SOURCE.parent / module.replace(".", "/")
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if module.startswith("sa3_convert") and file.is_file()), None)


ROOMS = (
    ("__init__", "errors", "arrays"),
    ("system",),
    ("hub", "scheduling"),
    ("checkpoint",),
    ("components",),
    ("recipe",),
    ("networks", "mnn", "ort"),
    ("bundle",),
    ("export", "rounding"),
    ("passes",),
    ("runtime",),
    ("check",),
    ("publish",),
    ("convert", "api"),
    ("lab/__init__", "lab/common"),
    ("lab/bench", "lab/bisect", "lab/doctor", "lab/miniature", "lab/planner"),
    ("lab/generations", "lab/golden"),
    ("lab/drift", "lab/report", "lab/selftest"),
    ("lab/sweep", "serve"),
    ("cli",),
    ("__main__",),
)
"""From the bottom to the top: a room imports rooms of the lines above its own, and none of its own line or below."""

DOCTORS_RESULTS = "sa3_convert.lab.doctor.results"
"""What the core may ask of the laboratory: the saved results of the probes, read without MNN or ONNX."""

UPWARDS = {
    ("checkpoint/reader.py", "sa3_convert.components"),
    ("checkpoint/reader.py", "sa3_convert.runtime.prompts"),
    ("rounding/network.py", "sa3_convert.check.inputs"),
    ("rounding/network.py", "sa3_convert.passes.quantise_embedding"),
}
"""Imports that go the wrong way. This list only gets shorter."""

LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(ROOMS) if room in rooms)


def imports_between_rooms() -> Iterator[tuple[Path, str, str]]:
    """Yield file, module that it imports, and the room of that, where it is another one."""
    for path in modules():
        for module in imports_of(path):
            file = file_of(module)
            if file is not None and room_of(file) != room_of(path):
                yield path, module, room_of(file)


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in modules()} == {room for rooms in ROOMS for room in rooms}


def test_the_tree_of_contributing_names_every_room() -> None:
    text = (SOURCE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown, above = set(), ""
    for line in text.split("```\nsa3_convert/\n")[1].split("```")[0].splitlines():
        name, inside = line.split()[0], line.startswith("    ")
        if line.startswith("  "):
            shown.add(f"{above}{name}" if inside else name)
            above = above if inside else name
    folders = {path.parent for path in modules()} - {SOURCE}
    rooms = {folder for folder in folders if folder.parent == SOURCE or folder.parent.name in ("lab", "mnn")}
    files = {path for path in modules() if path.parent in (SOURCE, SOURCE / "lab") and not path.name.startswith("__")}
    assert shown == {f"{room.relative_to(SOURCE)}/" for room in rooms} | {str(f.relative_to(SOURCE)) for f in files}


def test_rooms_import_one_way() -> None:
    upwards = {
        (str(path.relative_to(SOURCE)), module)
        for path, module, room in imports_between_rooms()
        if level_of(room) >= level_of(room_of(path)) and module != DOCTORS_RESULTS
    }
    assert upwards - UPWARDS == set(), "these imports go the wrong way"
    assert UPWARDS - upwards == set(), "these are gone; take them out of the list"


def test_the_core_never_imports_the_laboratory() -> None:
    asked = {
        (str(path.relative_to(SOURCE)), module)
        for path, module, room in imports_between_rooms()
        if room.startswith("lab/") and not room_of(path).startswith(("lab/", "serve", "cli"))
    }
    assert asked - UPWARDS == {("runtime/placement.py", DOCTORS_RESULTS)}


def test_what_is_imported_inside_functions_and_named_as_text_counts(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "def f():\n    from sa3_convert.lab import doctor\n    import sa3_convert.ort\n"
        "WORKER = 'sa3_convert.mnn.worker'\nNONE = 'sa3_convert.nothing'\n"
        "from sa3_convert.errors import Sa3Error\n"
    )
    expected = {"sa3_convert.lab.doctor", "sa3_convert.ort", "sa3_convert.mnn.worker", "sa3_convert.errors"}
    assert set(imports_of(file)) == expected


def test_no_onnx_file_is_read_or_written_in_a_format_that_its_name_chooses() -> None:
    calls = [
        (path.name, node)
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"onnx.load", "onnx.save", "ir.load", "ir.save"}
    ]
    assert calls
    assert [name for name, call in calls if "format" not in {keyword.arg for keyword in call.keywords}] == []


def test_no_file_is_too_long_to_be_read() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text("utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_too_long_to_be_read() -> None:
    long = {
        f"{path.relative_to(SOURCE)}:{node.name}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert long == set(), f"longer than {LONGEST_FUNCTION} lines"

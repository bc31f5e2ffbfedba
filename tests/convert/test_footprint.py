"""How much of the package one conversion runs through: what somebody has to know who follows it from end to end."""

import cProfile
import inspect
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import CodeType

from sa3_convert.cli import app
from sa3_convert.convert.code_digest import PACKAGE
from tests.bundles import CONFIGS

# With the integer form for ONNX Runtime (channels mixed, norms fused, the DiT in parts), which is made by default where
# the processor multiplies integers fast, and here everywhere.
MOST_FUNCTIONS = 835
MOST_FILES = 86


def test_a_conversion_from_scratch_runs_through_a_bounded_number_of_files_and_functions(
    toy: Path, tmp_path: Path
) -> None:
    command = ["convert", str(toy), "--recipe", str(CONFIGS / "int8.yaml"), "--out", str(tmp_path / "out")]
    command += ["--with-ort-int8", "--cache", str(tmp_path / "cache")]
    # In a new process: what this one has kept from other tests would not be run through again.
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        functions = processes.submit(_run_through, command).result()
    files = {file for file, *_ in functions}
    found = f"{len(functions)} functions in {len(files)} files"
    assert len(functions) <= MOST_FUNCTIONS, found
    assert len(files) <= MOST_FILES, found


def _run_through(command: list[str]) -> set[tuple[str, str, int]]:
    """Return file, name and line of what runs in this thread: neither in other processes, nor while modules load."""
    profile = cProfile.Profile(builtins=False)
    assert profile.runcall(app.run, command) == 0
    codes = {entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)}
    ours = {code for code in codes if Path(code.co_filename).is_relative_to(PACKAGE)}
    functions = {code for code in ours if code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")}
    return {(code.co_filename, code.co_qualname, code.co_firstlineno) for code in functions}

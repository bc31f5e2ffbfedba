"""How much of the package one conversion runs through: what somebody has to know who follows it from end to end."""

import cProfile
import inspect
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
    command += ["--with-ort-int8"]
    # In this process and thread: neither what the converter's own process runs, nor what is done while modules load.
    profile = cProfile.Profile(builtins=False)
    assert profile.runcall(app.run, [*command, "--cache", str(tmp_path / "cache")]) == 0
    codes = {entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)}
    ours = {code for code in codes if Path(code.co_filename).is_relative_to(PACKAGE)}
    functions = {code for code in ours if code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")}
    files = {code.co_filename for code in functions}
    found = f"{len(functions)} functions in {len(files)} files"
    assert len(functions) <= MOST_FUNCTIONS, found
    assert len(files) <= MOST_FILES, found

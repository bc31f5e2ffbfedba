"""Running a bundle needs neither torch nor onnx, nor anything else of the `convert` extra."""

import subprocess
import sys
from pathlib import Path

from sa3_convert.bundle.reader import Bundle

EXTRA = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "huggingface_hub", "ml_dtypes")

BLOCKED = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRA!r}:
            raise ImportError(f"blocked: {{name}}")
sys.meta_path.insert(0, Blocker())
from sa3_convert.cli import main
main(sys.argv[1:])
"""


def run_blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, check=False)


def test_a_bundle_generates_without_the_convert_extra(toy_int8: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out.wav"
    arguments = ["run", str(toy_int8.path), "--prompt", "rain", "--seconds", "1", "--steps", "2", "-o", str(out)]
    result = run_blocked(*arguments)
    assert result.returncode == 0, result.stderr
    assert out.stat().st_size > 44100 * 2 * 2


def test_inspect_and_export_work_without_it_too(toy_int8: Bundle, tmp_path: Path) -> None:
    assert run_blocked("inspect", str(toy_int8.path / "dit.mnn")).returncode == 0
    assert run_blocked("bundle", "export", str(toy_int8.path), "--to", str(tmp_path / "hub")).returncode == 0

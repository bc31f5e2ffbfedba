import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["pipeline", "opening", "engines", "audio", "noise"])
def test_the_runtime_imports_no_engine_before_it_is_used(module: str) -> None:
    code = (
        f"import sys, sa3_convert.runtime.{module}; "
        "found = {'torch', 'onnx', 'onnxruntime', 'MNN', 'safetensors'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

import pkgutil
import subprocess
import sys

from sa3_convert import runtime


def test_the_runtime_imports_no_engine_before_it_is_used() -> None:
    modules = ", ".join(f"sa3_convert.runtime.{module.name}" for module in pkgutil.iter_modules(runtime.__path__))
    code = (
        f"import sys, {modules}; "
        "found = {'torch', 'onnx', 'onnxruntime', 'MNN', 'safetensors'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

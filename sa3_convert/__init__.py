"""Stable Audio 3 checkpoints to verified MNN models: convert, prove, run.

Importing the package pulls in nothing heavy; torch, onnx, onnxruntime and MNN are imported by the stages that use them.
It switches off what these libraries would collect and send: ONNX Runtime, for one, writes a device id and a queue of
events into the user's cache and looks up its server. And it lets torch's OpenMP threads sleep while they wait, because
threads that spin take the processor from whatever else runs: beside busy processes the same work took eight times as
long. It also asks MKL, which computes torch's products, for sums that depend neither on the number of threads nor on
where an array lies: on AMD's processors the same rounding else gave other weights on two threads than on one. All this
is read when a library is first loaded, and processes that are started from here inherit it, so import this package
before the libraries.
"""

import os

os.environ.update(
    ORT_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What says how OpenMP's threads wait; whoever has set one of these decides."""
if not any(name in os.environ for name in WAITING):
    os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"

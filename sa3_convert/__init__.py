"""Stable Audio 3 checkpoints to verified MNN models: convert, prove, run.

Importing the package pulls in nothing heavy; torch, onnx, onnxruntime and MNN are imported by the stages that use them.
It switches off what these libraries would collect and send: ONNX Runtime, for one, writes a device id and a queue of
events into the user's cache and looks up its server. The switches are read when a library is first imported, and
processes that are started from here inherit them, so import this package before the libraries.
"""

import os

os.environ.update(
    ORT_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
)

__version__ = "0.1.0"

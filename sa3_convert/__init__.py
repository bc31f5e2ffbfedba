"""Stable Audio 3 checkpoints to verified MNN models: convert, prove, run.

Importing the package pulls in nothing heavy; torch, onnx, onnxruntime and MNN are imported by the stages that use them.
"""

__version__ = "0.1.0"

"""ONNX to ONNX rewrites, one file each, and the hazard lint."""

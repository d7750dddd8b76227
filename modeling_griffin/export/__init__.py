"""Griffins for other runtimes: `torch.export`, ONNX, and what builds on them."""

from .programs import export_onnx, export_program
from .stateful import StatefulGriffin


__all__ = ["StatefulGriffin", "export_onnx", "export_program"]

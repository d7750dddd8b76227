"""Recording CUDA graphs so that a recording that fails leaves PyTorch as it was."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph(graph, **options)`; where it fails, the stream and the random numbers are given back.

    What may not be captured, such as a value read on the host, invalidates the capture. PyTorch then leaves before it
    has given back the current stream, and before it has told its generators: they refuse to draw ("Offset increment
    outside graph capture") until another capture on the device ends well. So one does.

    Raises:
        What the block raises, or PyTorch at its end.
    """
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=before.device)
        torch.cuda.set_stream(before)
        raise

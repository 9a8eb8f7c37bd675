"""ZeroGPU, where a Space has a GPU only while a function decorated by the package `spaces` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Stream = Callable[..., Iterator[Any]]


def on_gpu(stream: Stream) -> Stream:
    """Decorate a generator by `spaces.GPU`; the generator itself where `spaces` is not installed.

    Outside ZeroGPU, `spaces.GPU` returns the generator as well. On ZeroGPU it runs in a forked process, so that its
    arguments and what it yields are pickled, and changes of other objects are lost.
    """
    try:
        import spaces
    except ImportError:
        return stream
    return spaces.GPU(stream)

"""Between the steps of a long computation: whoever started it may look whether it should go on."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

_between: ContextVar[Callable[[], None] | None] = ContextVar("between_steps", default=None)


@contextlib.contextmanager
def between_steps(check: Callable[[], None]) -> Iterator[None]:
    """Within the block `check` is called between the steps of this thread's inference; it may raise to end it.

    A step is one launch of an attention kernel, or one part of a linear layer's rows: seconds on a CPU at the most,
    where a layer over 500,000 tiles takes minutes.
    """
    token = _between.set(check)
    try:
        yield
    finally:
        _between.reset(token)


def next_step() -> None:
    """Call what `between_steps` was given, if anything."""
    if not torch.compiler.is_compiling() and (check := _between.get()) is not None:
        check()

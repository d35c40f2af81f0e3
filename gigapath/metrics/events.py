"""Curves for TensorBoard, where it is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

EVENTS = "events.out.tfevents"


def write_events(folder: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    """Write curves as the one file of events in a folder, in place of an earlier run's.

    Args:
        folder: made where it is missing.
        curves: name -> (step, value) in order.

    Returns:
        whether TensorBoard is installed; else nothing is written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    with SummaryWriter(str(folder)) as writer:  # type: ignore[no-untyped-call]
        for name, points in curves.items():
            for step, value in points:
                writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
    # Its file is named after the machine, and a second run would add a second one: ours has one name, and is replaced.
    newest = max(folder.glob(f"{EVENTS}.*"), key=lambda file: file.stat().st_mtime)
    newest.replace(folder / EVENTS)
    return True

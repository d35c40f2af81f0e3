"""Pictures of scores as PNG bytes, which the caller writes, and curves for TensorBoard, where it is installed.

Colours are those of Okabe and Ito, told apart by all.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath.evaluation.scores import IntArray

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
EVENTS = "events.out.tfevents"
MAX_NAMED_CLASSES = 20  # above this a confusion matrix is drawn without numbers in its cells


def plotting_available() -> bool:
    """Whether matplotlib is installed; it comes with the extra `train`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw_confusion(counts: IntArray, class_names: Sequence[str], *, title: str) -> bytes:
    """A confusion matrix: shade = share of the true class, number = rows; counts (C, C), row = true class."""
    classes = len(class_names)
    side = min(3.4 + 0.55 * classes, 14.0)
    figure, axes = _figure(side + 0.8, side, framed=True)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    slanted = classes > 3 and max(map(len, class_names)) > 3
    axes.set_xticks(range(classes), class_names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(classes), class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    if classes <= MAX_NAMED_CLASSES:
        for row in range(classes):
            for column in range(classes):
                ink = "black" if shares[row, column] > 0.55 else "white"
                text = f"{counts[row, column]:,}" + (f"\n{shares[row, column]:.0%}" if classes <= 8 else "")
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=11 if classes <= 8 else 7)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.04)
    return png(figure)


@dataclass(frozen=True)
class Curves:
    """Lines over one axis.

    Attributes:
        title: of all panels.
        x: what the axis is, with its unit.
        panels: what y is -> {name of the line: (x, y)}.
        mark: (x, words) of what was kept.
        log: the axis is logarithmic.
    """

    title: str
    x: str
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
    mark: tuple[float, str] | None = None
    log: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        panels = [
            {"y": y, "lines": [{"name": name, "x": list(xs), "y": list(ys)} for name, (xs, ys) in lines.items()]}
            for y, lines in self.panels.items()
        ]
        mark = None if self.mark is None else {"x": self.mark[0], "words": self.mark[1]}
        return {"title": self.title, "x": self.x, "panels": panels, "mark": mark, "log": self.log}


def draw_curves(curves: Curves) -> bytes:
    """Curves over one x axis, one panel below the other."""
    at = np.log10 if curves.log else np.asarray
    panels = {
        y: {name: (at(np.asarray(xs, dtype=float)), ys) for name, (xs, ys) in lines.items()}
        for y, lines in curves.panels.items()
    }
    figure, axes = _figure(7.0, 1.0 + 2.4 * len(panels), rows=len(panels))
    all_axes = [axes] if len(panels) == 1 else list(axes)
    for ax, (y_label, lines) in zip(all_axes, panels.items(), strict=True):
        for index, (name, (x, y)) in enumerate(lines.items()):
            look = {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)], "linewidth": 1.6}
            ax.plot(x, y, label=name, marker="o" if len(x) == 1 else None, **look)
        if curves.mark is not None:
            ax.axvline(float(at(curves.mark[0])), color="0.45", linewidth=1, linestyle=":", label=curves.mark[1])
        ax.set_ylabel(y_label)
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.legend(frameon=False, fontsize=9)
    places = {float(x) for lines in panels.values() for xs, _ in lines.values() for x in xs}
    if len(places) == 1:
        all_axes[-1].set_xticks(list(places), [f"{place:g}" for place in places])
    elif all(place.is_integer() for place in places):
        all_axes[-1].xaxis.get_major_locator().set_params(integer=True)  # no epoch 2.5
    all_axes[-1].set_xlabel(f"log10 of the {curves.x}" if curves.log else curves.x)
    all_axes[0].set_title(curves.title)
    return png(figure)


def draw_intervals(
    rows: Mapping[str, tuple[float, float, float]], *, x_label: str, title: str, zero: bool = False
) -> bytes:
    """Values with intervals, one line per name: name -> (value, low, high); with a line at `zero` for differences."""
    figure, axes = _figure(7.0, 1.4 + 0.45 * len(rows))
    if zero:
        axes.axvline(0, color="0.45", linewidth=1)
    for position, (value, low, high) in enumerate(rows.values()):
        axes.plot([low, high], [position, position], color=COLOURS[0], linewidth=2, solid_capstyle="butt")
        axes.plot([value], [position], color=COLOURS[1], marker="D", markersize=6, linestyle="")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(x_label)
    axes.set_title(title)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return png(figure)


def draw_survival(groups: Mapping[str, Any], title: str) -> bytes:
    """Kaplan-Meier curves of groups with censorings as ticks, the numbers at risk below, and the log-rank p.

    Args:
        groups: of `scores.risk_groups`.
    """
    figure, axes = _figure(7.0, 4.8)
    for index, curve in enumerate(groups["curves"]):
        times, shares = np.array([0.0, *curve["times"]]), np.array([1.0, *curve["survival"]])
        colour, style = COLOURS[index], STYLES[index % len(STYLES)]
        name = f"{curve['name']}: {curve['at_risk'][0]:,}, {curve['events']:,} events"
        axes.step(times, shares, where="post", color=colour, linestyle=style, linewidth=1.6, label=name)
        censored = np.array([0, *curve["censored"]]) > 0
        axes.plot(times[censored], shares[censored], "|", color=colour, markersize=7)
    marks = groups["curves"][0]["marks"]
    counts = zip(*(curve["at_risk"] for curve in groups["curves"]), strict=True)
    ticks = [
        "\n".join([f"{mark:g}", *(f"{count:,}" for count in row)]) for mark, row in zip(marks, counts, strict=True)
    ]
    axes.set_xticks(marks, ticks)
    axes.set_xlabel("time, and the numbers at risk: " + ", ".join(curve["name"] for curve in groups["curves"]))
    axes.set_ylabel("share without the event")
    axes.set_ylim(-0.02, 1.04)
    axes.set_title(title)
    p = groups["p"]
    axes.legend(frameon=False, title=None if p is None or np.isnan(p) else f"log-rank p = {p:.2g}")
    return png(figure)


def draw_scatter(truth: npt.NDArray[np.floating], said: npt.NDArray[np.floating], *, name: str, title: str) -> bytes:
    """Predicted against true amounts (N,), with the identity line."""
    figure, axes = _figure(5.4, 5.0)
    ends = [min(truth.min(), said.min()), max(truth.max(), said.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, label="identity")
    axes.plot(truth, said, ".", color=COLOURS[0], markersize=5, alpha=0.6)
    axes.set_xlabel(f"{name}, true")
    axes.set_ylabel(f"{name}, predicted")
    axes.set_title(title)
    axes.legend(frameon=False)
    return png(figure)


def write_events(folder: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    """Write curves as the one file of events in a folder, in place of an earlier run's.

    Args:
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


def _figure(width: float, height: float, rows: int = 1, *, framed: bool = False) -> tuple[Any, Any]:
    """A figure (inches) with its axes, open above and right unless `framed`, without pyplot's process-wide state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib: not installed. Pictures need it: pip install 'gigapath[train]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for each in () if framed else axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows > 1 else axes[0]


def png(figure: Any) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()

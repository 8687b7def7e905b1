"""The figures of a report as PNG, by matplotlib. Each function draws on axes; what users named is shown as text, never as markup."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import MissingExtra
from modelworks.core.tasks import primary
from modelworks.ml.evaluate.predictions import Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLASSES = 30  # of a confusion matrix that is drawn
_CURVES = 10  # classes with a curve of their own
_POINTS = 2000
_WIDE = 10.0  # times that the highest value is above the lowest: then a logarithmic scale shows more
_BLUE, _GREY, _RED = "#2563eb", "#9ca3af", "#dc2626"

Plot = tuple[str, str, Callable[["Axes"], None]]
Point = dict[str, Any]


def draw(report: dict[str, Any], found: Predictions | None, points: Sequence[Point]) -> list[tuple[str, str, bytes]]:
    """(name, title, PNG) of all that the report has: `found` are its predictions, `points` the data of its job's `metric`
    events.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("plots need matplotlib; pip install 'modelworks[train]'") from None
    drawn = []
    for name, title, plot in plots(report, found, points):
        figure = Figure(figsize=(6.4, 4.4), dpi=110, layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set_title(_text(title), fontsize=11)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        drawn.append((name, title, out.getvalue()))
    return drawn


def plots(report: dict[str, Any], found: Predictions | None, points: Sequence[Point]) -> list[Plot]:
    details, metrics = report["details"], report["metrics"]
    made: list[Plot] = []
    matrix = details.get("confusion_matrix")
    if matrix and len(matrix["classes"]) <= _CLASSES:
        made.append(("confusion-matrix", "Confusion matrix", lambda a: _confusion(a, matrix)))
    classes = matrix["classes"] if matrix else None
    if found is not None and "score_quantiles" in details:
        made.append(("scores", "Anomaly scores", lambda a: _scores(a, found)))
    ones = _ones(details, found, classes) if found is not None else []
    if ones:
        made.append(("roc", "ROC curve", lambda a: _roc(a, ones)))
        made.append(("precision-recall", "Precision and recall", lambda a: _precision_recall(a, ones)))
    if details.get("calibration"):
        made.append(("calibration", "Calibration", lambda a: _calibration(a, details["calibration"])))
    if details.get("curves"):
        made.append(("precision-recall", "Precision and recall at IoU 0.5", lambda a: _box_curves(a, details)))
    if found is not None and details.get("clusters") and np.isfinite(found.output[:, 1]).any():
        made.append(("silhouette", "Silhouettes", lambda a: _silhouettes(a, found)))
    if found is not None and "low" in found.beside:
        made.append(("forecast", "Truth and forecast", lambda a: _forecast(a, found)))
    numbers = _numbers(details, found) if found is not None else None
    if numbers:
        made.append(("predicted", "Predicted against true", lambda a: _predicted(a, *numbers)))
        made.append(("residuals", "Residuals: true - predicted", lambda a: _residuals(a, *numbers)))
    curves = learning_curves(points)
    if curves:
        made.append(("learning-curve", "Learning curve", lambda a: _learning(a, curves)))
    task = details.get("task")
    several = {name: one for name, one in metrics.items() if len([f for f in one.get("folds") or [] if f is not None]) > 1}
    if (first := primary(task, several)) is not None:
        made.append(("folds", f"{first} of each fold", lambda a: _folds(a, several[first])))
    slices = [one for one in details.get("slices") or [] if one["metrics"]]
    if slices:
        name = str(primary(task, slices[0]["metrics"]))
        made.append(("slices", f"{name} by slice", lambda a: _slices(a, slices, name, metrics.get(name))))
    return made


def _text(value: Any) -> str:
    """Short, and no mathematics: a dollar is a dollar."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return (text[:39] + "…" if len(text) > 40 else text).replace("$", r"\$")


def _confusion(axes: Axes, matrix: dict[str, Any]) -> None:
    counts = np.asarray(matrix["counts"], dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    names = [_text(name) for name in matrix["classes"]]
    places = np.arange(len(names))
    axes.set_xticks(places, names, rotation=45 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    if len(names) <= 12:
        for row in places:
            for column in places:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(float(column), float(row), f"{int(counts[row, column])}", ha="center", va="center", color=colour, fontsize=9)
    axes.set(xlabel="predicted", ylabel="true")


One = tuple[str, np.ndarray, np.ndarray]


def _ones(details: dict[str, Any], found: Predictions, classes: Sequence[Any] | None) -> list[One]:
    """(name, whether it is, its probability or score) of each class that has a curve; none where the rows are all alike."""
    known = found.true >= 0
    if "score_quantiles" in details and len(np.unique(found.true[known])) > 1:
        return [("anomaly", found.true[known] == 1, found.output[known, 0])]
    if not classes or not details.get("calibration") or len(np.unique(found.true)) < 2:
        return []
    if len(classes) == 2:
        return [(_text(classes[1]), found.true == 1, found.output[:, 1])]
    return [
        (_text(name), found.true == k, found.output[:, k])
        for k, name in enumerate(classes[:_CURVES])
        if (found.true == k).any()
    ]


def _numbers(details: dict[str, Any], found: Predictions) -> tuple[np.ndarray, np.ndarray] | None:
    """(true, said) where both are numbers: of values, forecasts and ratings."""
    if found.output.ndim == 1:
        return found.true, found.output
    return (found.true, found.output[:, 0]) if details.get("feedback") == "ratings" else None


def _scores(axes: Axes, found: Predictions) -> None:
    """By the label where there are labels, else by the flag."""
    score, flag = found.output[:, 0], found.output[:, 1] > 0
    kinds = [("anomaly", found.true == 1, _RED), ("usual", found.true == 0, _BLUE), ("not known", found.true < 0, _GREY)]
    if not (found.true >= 0).any():
        kinds = [("flagged", flag, _RED), ("not flagged", ~flag, _BLUE)]
    above = score[score > 0]
    wide = len(above) == len(score) and above.max() > _WIDE * above.min()
    low, high = score.min(), max(score.max(), score.min() + 1e-12)
    bins = np.geomspace(low, high, 41) if wide else np.linspace(low, high, 41)
    shown = [(name, score[rows], colour) for name, rows, colour in kinds if rows.any()]
    names, values, colours = zip(*shown, strict=True)
    axes.hist(values, bins=bins.tolist(), stacked=True, color=colours, label=names, alpha=0.8)
    if flag.any() and not flag.all():
        axes.axvline((score[flag].min() + score[~flag].max()) / 2, color="black", lw=1, ls="--", label="flagged from here on")
    if wide:
        axes.set_xscale("log")
    axes.set(xlabel="score", ylabel="rows")
    axes.legend(fontsize=8)


def _roc(axes: Axes, ones: Sequence[One]) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    for name, truth, score in ones:
        away, hit, _ = roc_curve(truth, score)
        axes.plot(*_thin(away, hit), label=f"{name}: {roc_auc_score(truth, score):.3f}", lw=1.5)
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls="--")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(title="area under the curve", fontsize=8, title_fontsize=8, loc="lower right")


def _precision_recall(axes: Axes, ones: Sequence[One]) -> None:
    from sklearn.metrics import average_precision_score, precision_recall_curve

    for name, truth, score in ones:
        precision, recall, _ = precision_recall_curve(truth, score)
        axes.plot(*_thin(recall, precision), label=f"{name}: {average_precision_score(truth, score):.3f}", lw=1.5)
    axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.03))
    axes.legend(title="average precision", fontsize=8, title_fontsize=8, loc="lower left")


def _box_curves(axes: Axes, details: dict[str, Any]) -> None:
    for name, precision in details["curves"].items():
        found = details["per_class"][name]["average_precision_50"]
        axes.plot(np.linspace(0, 1, len(precision)), precision, label=f"{_text(name)}: {found:.3f}", lw=1.5)
    axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.03))
    axes.legend(title="average precision", fontsize=8, title_fontsize=8, loc="lower left")


def _silhouettes(axes: Axes, found: Predictions) -> None:
    """Each cluster's rows, the best first, cluster below cluster."""
    known = np.isfinite(found.output[:, 1])
    cluster, value = found.output[known, 0], found.output[known, 1]
    order = np.lexsort((-value, cluster))
    for place, number in enumerate(np.unique(cluster)):
        rows = np.flatnonzero(cluster[order] == number)
        axes.fill_betweenx(rows, 0, value[order][rows], color=f"C{place % 10}", lw=0, step="mid")
    axes.axvline(float(value.mean()), color="black", lw=1, ls="--", label=f"mean {value.mean():.3f}")
    axes.invert_yaxis()
    axes.set(xlabel="silhouette", ylabel="rows, cluster by cluster")
    axes.legend(fontsize=8)


def _calibration(axes: Axes, found: dict[str, Any]) -> None:
    bins = [one for one in found["bins"] if one["rows"]]
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls="--")
    axes.plot([one["probability"] for one in bins], [one["share"] for one in bins], color=_BLUE, marker="o", lw=1.5)
    axes.set(xlabel=f"probability of {found['of']}", ylabel="share that it was", xlim=(0, 1), ylim=(0, 1.03))
    axes.text(0.03, 0.94, f"expected calibration error {found['ece']:.3f}", fontsize=9)


def _predicted(axes: Axes, true: np.ndarray, said: np.ndarray) -> None:
    true, said = _thin(true, said)
    axes.scatter(true, said, s=10, alpha=0.5, color=_BLUE, linewidths=0)
    low, high = min(true.min(), said.min()), max(true.max(), said.max())
    axes.plot([low, high], [low, high], color=_GREY, lw=1, ls="--")
    axes.set(xlabel="true", ylabel="predicted")


def _residuals(axes: Axes, true: np.ndarray, said: np.ndarray) -> None:
    axes.hist(true - said, bins=min(50, max(5, len(true) // 8)), color=_BLUE, alpha=0.8)
    axes.axvline(0, color=_GREY, lw=1, ls="--")
    axes.set(xlabel="true - predicted", ylabel="rows")


def _forecast(axes: Axes, found: Predictions) -> None:
    count = len(found.true)
    ends = np.flatnonzero(np.diff(found.beside.get("series", np.zeros(count)))) + 1

    def apart(values: np.ndarray) -> np.ndarray:  # no line joins two series
        return np.insert(values.astype(np.float64), ends, np.nan)

    steps = apart(np.arange(count))
    axes.fill_between(steps, apart(found.beside["low"]), apart(found.beside["high"]), color=_BLUE, alpha=0.15, lw=0)
    axes.plot(steps, apart(found.true), color="black", lw=1.2, label="truth")
    axes.plot(steps, apart(found.output), color=_BLUE, lw=1.5, label="forecast")
    axes.set(xlabel="tested steps, in order" if not len(ends) else "tested steps, series after series", ylabel="value")
    axes.legend(fontsize=8)


def learning_curves(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """By `part: metric` the losses of each epoch; a gap (NaN) where the epochs begin anew, as in a second fit."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.get("unit") != "epoch":
            continue
        for name in ("loss", "val_loss"):
            value = point["values"].get(name)
            if value is not None:
                line = found.setdefault(f"{point.get('part') or ''}\0{name}", [])
                if line and point["step"] <= line[-1][0]:
                    line.append((point["step"], math.nan))
                line.append((point["step"], value))
    return {name: line for name, line in found.items() if len(line) > 1}


def _learning(axes: Axes, curves: dict[str, list[tuple[float, float]]]) -> None:
    parts = list(dict.fromkeys(name.partition("\0")[0] for name in curves))
    for key, line in curves.items():
        part, _, name = key.partition("\0")
        steps, losses = zip(*line, strict=True)
        colour = f"C{parts.index(part) % 10}"
        shown = len(parts) <= 6 or parts.index(part) == 0
        label = _text(f"{part}: {name}" if part else name) if shown else None
        axes.plot(steps, losses, color=colour, ls="--" if name == "val_loss" else "-", lw=1.3, label=label)
    values = [value for line in curves.values() for _, value in line if math.isfinite(value)]
    if values and max(values) > _WIDE * min(values) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend(fontsize=8)


def _folds(axes: Axes, found: dict[str, Any]) -> None:
    values = [(at, value) for at, value in enumerate(found["folds"], start=1) if value is not None]
    axes.axhline(found["mean"], color=_GREY, lw=1, ls="--", label="mean")
    if found.get("low") is not None:
        axes.axhspan(found["low"], found["high"], color=_BLUE, alpha=0.1, lw=0, label="95 % interval of the mean")
    axes.scatter(*zip(*values, strict=True), color=_BLUE, zorder=3)
    axes.set(xlabel="fold")
    axes.set_xticks([at for at, _ in values] if len(values) <= 20 else axes.get_xticks())
    axes.legend(fontsize=8)


def _slices(axes: Axes, slices: list[dict[str, Any]], name: str, whole: dict[str, Any] | None) -> None:
    shown = [one for one in slices if one["metrics"].get(name, {}).get("mean") is not None][:30]
    places = np.arange(len(shown))
    for place, one in zip(places, shown, strict=True):
        found = one["metrics"][name]
        if found["low"] is not None:
            axes.plot([found["low"], found["high"]], [place, place], color=_BLUE, lw=2)
        axes.scatter([found["mean"]], [place], color=_BLUE, zorder=3)
    if whole and whole.get("mean") is not None:
        axes.axvline(whole["mean"], color=_RED, lw=1, ls="--", label="all rows")
        axes.legend(fontsize=8)
    axes.set_yticks(places, [_text(f"{one['slice']} ({one['rows']})") for one in shown], fontsize=8)
    axes.invert_yaxis()


def _thin(*arrays: np.ndarray) -> list[np.ndarray]:
    """At most _POINTS of them, evenly."""
    count = len(arrays[0])
    chosen = np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(np.int64))
    return [array[chosen] for array in arrays]

"""Metrics of a version or a report as tables for people."""

from __future__ import annotations

from typing import Any

from modelworks.cli.session import Session
from modelworks.cli.text import interval, number, plain

_CLASSES = 12  # of a confusion matrix that is shown
_SHOWN = 30  # classes that are listed


def metrics_table(session: Session, metrics: dict[str, Any]) -> None:
    if not metrics:
        return
    session.table(
        ("metric", "mean [95 % interval]", "deviation", "folds"),
        (
            (
                name,
                interval(found),
                number(found.get("std")),
                " ".join(number(fold) for fold in found.get("folds") or []),
            )
            for name, found in metrics.items()
            if isinstance(found, dict)
        ),
    )


def details_tables(session: Session, details: dict[str, Any]) -> None:
    """The confusion matrix, the classes, what was wrong in texts, a forecast's intervals, the quantiles of the residuals."""
    confusion = details.get("confusion_matrix")
    if isinstance(confusion, dict) and len(confusion["classes"]) <= _CLASSES:
        classes = [plain(name) for name in confusion["classes"]]
        rows = zip(classes, confusion["counts"], strict=True)
        session.table(("true \\ predicted", *classes), ((name, *map(number, counts)) for name, counts in rows))
    _per_class(session, details.get("per_class") or {})
    for what, found in (details.get("errors") or {}).items():
        session.table((what, *found), [("count", *map(number, found.values()))])
    forecast = details.get("forecast") or {}
    if "level" in forecast:
        names = ("level", "coverage", "interval_width")
        head = ("intervals", *(name.replace("_", " ") for name in names))
        session.table(head, [("split-conformal", *(number(forecast.get(name)) for name in names))])
    if found := details.get("per_series"):
        session.table(tuple(found[0]), ((plain(one["series"]), *map(number, list(one.values())[1:])) for one in found[:_SHOWN]))
        if len(found) > _SHOWN:
            session.say(f"and {len(found) - _SHOWN} series more; --json shows all")
    residuals = details.get("residual_quantiles")
    if isinstance(residuals, dict):
        session.table(
            ("true - predicted", *(f"p{float(name) * 100:g}" for name in residuals)),
            [("quantile", *map(number, residuals.values()))],
        )


def _per_class(session: Session, found: dict[str, Any]) -> None:
    if found:
        keys = list(next(iter(found.values())))
        shown = list(found.items())[:_SHOWN]
        session.table(("class", *keys), ((plain(name), *(number(one[key]) for key in keys)) for name, one in shown))
        if len(found) > len(shown):
            session.say(f"and {len(found) - len(shown)} classes more; --json shows all")


def baselines_table(session: Session, report_metrics: dict[str, Any], baselines: dict[str, Any]) -> None:
    """What a forecast or a text would be without learning, on the same rows."""
    if baselines:
        names = [name for name in ("mase", "smape", "mae", "rmse", "perplexity", "bits_per_byte") if name in report_metrics]
        session.table(
            ("forecast", *names),
            (
                (name, *(interval(found.get(metric) or {}) for metric in names))
                for name, found in (("model", report_metrics), *baselines.items())
            ),
        )


def slices_table(session: Session, slices: list[dict[str, Any]]) -> None:
    """A line for each slice and metric."""
    if slices:
        session.table(
            ("slice", "rows", "metric", "mean [95 % interval]"),
            (
                (plain(one["slice"]), one["rows"], name, interval(found))
                for one in slices
                for name, found in (one["metrics"] or {"-": {"mean": None}}).items()
            ),
        )

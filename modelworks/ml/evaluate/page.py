"""A report as one HTML page that needs nothing else: no scripts, no links elsewhere, figures inside, everything escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_SERIES = 100  # shown
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .5rem;border-bottom:1px solid #ddd}
p.about{color:#555;margin:0}table{border-collapse:collapse;margin:.3rem 0}
th,td{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid #eee;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.figures{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;flex:1 1 28rem;max-width:36rem}
figure img{width:100%;height:auto;background:#fff;border:1px solid #eee}
ul{padding-left:1.2rem}.better{color:#15803d}.worse{color:#b91c1c}
@media(prefers-color-scheme:dark){body{color:#eee;background:#111}th,td{border-color:#333}h2{border-color:#444}p.about{color:#aaa}}
"""


def page(report: dict[str, Any], drawn: Sequence[tuple[str, str, bytes]]) -> str:
    """`drawn`: (name, title, PNG) of its figures."""
    details, metrics = report["details"], report["metrics"]
    model = report["model_version"] or report["model"]
    method = ", ".join(f"{name} {value}" for name, value in report["method"].items())
    facts = [("data", f"{report['dataset']} ({report['dataset_digest'][:12]})"), ("method", method), ("seed", report["seed"])]
    facts += [("report", report["id"]), ("job", report["job_id"])]
    parts = [
        f"<h1>{_e(model)}</h1>",
        f'<p class="about">{" · ".join(f"{_e(name)}: {_e(value)}" for name, value in facts)}</p>',
        _notes(details),
        "<h2>Metrics</h2>",
        _table(
            ("metric", "mean", "95 % interval", "deviation", "folds"),
            (
                (name, _n(one["mean"]), _interval(one), _n(one["std"]), " ".join(_n(fold) for fold in one["folds"]))
                for name, one in metrics.items()
            ),
        ),
        _baselines(metrics, details.get("baselines") or {}),
        _gates(details.get("gates") or []),
        _comparison(model, details.get("comparison")),
        _figures(drawn),
        _classes(details.get("per_class") or {}),
        _threshold(details),
        _per_series(details.get("per_series") or []),
        _slices(details.get("slices") or []),
        *(_line(title, found) for title, found in _found(details)),
    ]
    title = _e(f"{model} on {report['dataset']}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(parts)}</body></html>\n'


def _e(value: Any) -> str:
    return escape(str(value), quote=True)


def _n(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(one: dict[str, Any]) -> str:
    return "-" if one.get("low") is None else f"{_n(one['low'])} to {_n(one['high'])}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = "".join(
        "<tr>" + "".join(f'<td{"" if not at else " class=n"}>{_e(cell)}</td>' for at, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    titles = "".join(f'<th{"" if not at else " class=n"}>{_e(title)}</th>' for at, title in enumerate(head))
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _notes(details: dict[str, Any]) -> str:
    notes = [*(details.get("notes") or []), *(details.get("warnings") or [])]
    if not notes:
        return ""
    return "<ul>" + "".join(f"<li>{_e(note)}</li>" for note in dict.fromkeys(notes)) + "</ul>"


def _baselines(metrics: dict[str, Any], baselines: dict[str, Any]) -> str:
    if not baselines:
        return ""
    names = list(metrics)
    rows = [
        (name, *(_n((found.get(metric) or {}).get("mean")) for metric in names))
        for name, found in (("model", metrics), *baselines.items())
    ]
    return "<h2>Beside its baselines</h2>" + _table(("", *names), rows)


def _gates(gates: list[dict[str, Any]]) -> str:
    if not gates:
        return ""
    rows = [
        (one["metric"], _n(one.get("at_least")), _n(one.get("at_most")), _n(one["value"]), "passed" if one["passed"] else "failed")
        for one in gates
    ]
    return "<h2>Gates</h2>" + _table(("metric", "at least", "at most", "value", ""), rows)


def _comparison(model: str, found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    other = found.get("with", "the other")
    rows = [
        (name, _n(one["model"]), _n(one["other"]), _n(one["difference"]), _interval(one), _n(one["p_value"]), one["verdict"])
        for name, one in found["metrics"].items()
    ]
    verdict = f"{model} against {other}: {found['verdict']}, by {found['decided_by']}; {found['method']['name']}."
    if found.get("mcnemar"):
        verdict += f" McNemar's exact test of the labels: p = {_n(found['mcnemar']['p_value'])}."
    head = ("metric", model, other, "difference", "95 % interval", "p", "verdict")
    return f"<h2>Comparison</h2><p>{_e(verdict)}</p>" + _table(head, rows)


def _figures(drawn: Sequence[tuple[str, str, bytes]]) -> str:
    if not drawn:
        return ""
    images = "".join(
        f'<figure><img alt="{_e(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for _, title, png in drawn
    )
    return f'<h2>Figures</h2><div class="figures">{images}</div>'


def _classes(found: dict[str, Any]) -> str:
    if not found:
        return ""
    keys = list(next(iter(found.values())))
    rows = [(name, *(_n(one[key]) for key in keys)) for name, one in found.items()]
    return "<h2>Classes</h2>" + _table(("class", *(key.replace("_", " ") for key in keys)), rows)


def _threshold(details: dict[str, Any]) -> str:
    chosen, best = details.get("threshold"), details.get("thresholds")
    if not best:
        return ""
    said = f" Labels are by {_n(chosen['value'])} ({chosen['by']})." if chosen else ""
    rows = [
        (name, *(_n(best[name][key]) for key in ("threshold", "precision", "recall", "f1", "youden"))) for name in ("f1", "youden")
    ]
    about = f"From which probability of {best['positive']} on to say it, best on these rows by F1 and by Youden's J.{said}"
    head = ("best by", "threshold", "precision", "recall", "F1", "Youden's J")
    return f"<h2>Thresholds</h2><p>{_e(about)}</p>" + _table(head, rows)


def _found(details: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, figures by name) of what a report says in a line."""
    forecast = details.get("forecast") or {}
    counted = {name: details[name] for name in ("feedback", "rows", "users", "items", "top_k") if "feedback" in details}
    return [
        ("Residuals (true - predicted), by share of the rows below", details.get("residual_quantiles") or {}),
        ("Anomaly scores, by share of the rows below", details.get("score_quantiles") or {}),
        ("Labels", details.get("labelled") or {}),
        ("Forecast", {name: value for name, value in forecast.items() if not isinstance(value, list)}),
        ("Coverage of the intervals, by steps ahead", dict(enumerate(forecast.get("coverage_by_step") or (), start=1))),
        ("Recommendations", counted),
        *((f"Of the {what}", errors) for what, errors in (details.get("errors") or {}).items()),
        ("Clusters, by their rows", clusters if isinstance(clusters := details.get("clusters"), dict) else {}),
        ("Read", details.get("language") or {}),
        ("How it was computed", details.get("signatures") or {}),
    ]


def _line(title: str, found: dict[str, Any]) -> str:
    return f"<h2>{_e(title)}</h2>" + _table(list(found), [[_n(value) for value in found.values()]]) if found else ""


def _per_series(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = [[_n(value) for value in one.values()] for one in found[:_SERIES]]
    more = f"<p>The worst {_SERIES} of {len(found)}.</p>" if len(found) > _SERIES else ""
    return "<h2>Series by series</h2>" + more + _table(list(found[0]), rows)


def _slices(slices: list[dict[str, Any]]) -> str:
    if not slices:
        return ""
    rows = [
        (one["slice"], one["rows"], name, _n(found["mean"]), _interval(found), one["note"] or "")
        for one in slices
        for name, found in (one["metrics"] or {"-": {"mean": None}}).items()
    ]
    return "<h2>Slices</h2>" + _table(("slice", "rows", "metric", "mean", "95 % interval", ""), rows)

"""The command line against a server that remembers what it was asked: output, exit codes, and that text stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modelworks.cli.app import app
from modelworks.cli.text import lines, plain, to_json
from modelworks.core.settings import Settings
from tests.client_fake import (
    DATASET,
    DEPLOYMENT,
    DONE,
    JOB,
    KEY,
    METRICS,
    PREDICTION,
    REPORT,
    VERSION,
    FakeServer,
    Reply,
    event,
    page,
    problem,
    sse,
)

EVIL = "\x1b]0;owned\x07[bold red]x[/]\u202e\x9b2J"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def cli(fake: FakeServer) -> Any:
    def run(*arguments: str, server: bool = True) -> Any:
        connection = ["--url", fake.url, "--api-key", KEY] if server else []
        return CliRunner().invoke(app, [*arguments, *connection])

    return run


# what is shown


@pytest.mark.parametrize(
    ("arguments", "path", "reply", "shown"),
    [
        (["data", "list"], "/api/v1/datasets", page(DATASET), ["iris:2", "150", "9f86d081884c"]),
        (["data", "show", "iris"], "/api/v1/datasets/iris", DATASET, ["petal", "number", "6.9"]),
        (["models", "list"], "/api/v1/models", page(VERSION), ["iris:1", "accuracy 0.9600 [0.9300, 0.9800]", "10.9 kB"]),
        (["models", "show", "iris:1"], "/api/v1/models/iris/versions/1", VERSION, ["aa11bb22cc33dd44", "FP32 [-1, 1]"]),
        (["reports", "list"], "/api/v1/reports", page(REPORT), ["rep_1", "iris:2", "accuracy 0.9600"]),
        (["deployments", "list"], "/api/v1/deployments", page(DEPLOYMENT), ["iris:1", "ready"]),
        (["jobs", "list"], "/api/v1/jobs", page(DONE), ["job_1", "succeeded", "100%"]),
        (["jobs", "show", "job_1"], "/api/v1/jobs/job_1", DONE, ["ridge", "rep_1"]),
        (["projects", "list"], "/api/v1/projects", page({"id": "proj_1", "name": "lab"}), ["proj_1", "lab"]),
        (["users", "list"], "/api/v1/users", page({"id": "user_1", "name": "ada"}), ["user_1", "ada"]),
        (["audit"], "/api/v1/audit", page({"project_id": "p", "principal": "key_1", "action": "a.b", "object": "iris"}), ["a.b"]),
        (["usage"], "/api/v1/usage", page({"project_id": "p", "key_id": "key_1", "calls": 41, "prompt_tokens": 7}), ["key_1", "41", "7"]),
        (["algorithms"], "/api/v1/algorithms", page({"name": "ridge", "task": "tabular-regression"}), ["ridge"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_tables_for_people_and_json_for_programs(cli: Any, fake: FakeServer, arguments, path, reply, shown) -> None:  # type: ignore[no-untyped-def]
    fake.on("GET", "/api/v1/models/iris", {"name": "iris", "versions": [VERSION]})
    fake.on("GET", path, reply)
    done = cli(*arguments)
    assert done.exit_code == 0, done.stderr
    for text in shown:
        assert text in done.stdout
    assert json.loads(cli(*arguments, "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "path", "reply"),
    [
        (["data", "list"], "/api/v1/datasets", page({**DATASET, "name": EVIL})),
        (["models", "list"], "/api/v1/models", page({**VERSION, "name": EVIL, "algorithm": EVIL})),
        (["deployments", "list"], "/api/v1/deployments", page({**DEPLOYMENT, "name": EVIL, "message": EVIL})),
        (["jobs", "list"], "/api/v1/jobs", page({**JOB, "spec": {"model": EVIL}})),
        (["jobs", "logs", "job_1"], "/api/v1/jobs/job_1/log", Reply(EVIL.encode())),
        (["jobs", "logs", "job_1", "-f"], "/api/v1/jobs/job_1/events/stream", sse(event(1, "log", EVIL))),
        (["status"], "/api/v1/whoami", problem(500, "internal", EVIL)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_users_named_cannot_steer_the_terminal(cli: Any, fake: FakeServer, arguments, path, reply) -> None:  # type: ignore[no-untyped-def]
    fake.on("GET", path, reply)
    for more in ([], ["--json"]):
        done = cli(*arguments, *more)
        output = done.stdout + done.stderr
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(output)
        assert "[bold red]x[/]" in output  # markup is shown, not obeyed


def test_plain_text() -> None:
    assert plain("a\x1b[1m\nb\x85\u2028é汉") == "a\\x1b[1m\\nb\\x85\\u2028é汉"
    assert lines("a\r\nb\x1b\tc") == "a\nb\\x1b\tc"
    assert json.loads(to_json({"a": "\x1b\x9b\u202e汉"})) == {"a": "\x1b\x9b\u202e汉"}
    assert "\x9b" not in to_json("\x9b")


# exit codes


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "invalid_input", 2), (413, "payload_too_large", 2), (422, "idempotency_mismatch", 2), (401, "unauthenticated", 3),
        (403, "forbidden", 3), (404, "not_found", 4), (409, "conflict", 1), (500, "internal", 1), (504, "deadline_exceeded", 5),
    ],
)  # fmt: skip
def test_exit_codes(cli: Any, fake: FakeServer, status: int, code: str, exit_code: int) -> None:
    fake.on("GET", "/api/v1/models", problem(status, code, "do this next"))
    done = cli("models", "list")
    assert done.exit_code == exit_code
    assert done.stdout == ""
    assert done.stderr.startswith("error: do this next")
    assert len(done.stderr.splitlines()) == 1


def test_no_server_is_five(cli: Any, fake: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MODELWORKS_URL", raising=False)
    done = cli("status", "--home", str(tmp_path), server=False)
    assert done.exit_code == 5
    assert "modelworks up" in done.stderr


def test_wrong_usage_is_two(cli: Any) -> None:
    assert cli("models", "nonsense").exit_code == 2
    assert cli("train", "iris").exit_code == 2
    assert cli("up", "--port", "70000", server=False).exit_code == 2
    done = cli("train", "iris", "--dataset", "d", "--target", "t", "--algorithm", "a", "--gate", "accuracy=1")
    assert (done.exit_code, "metric>=number" in done.stderr) == (2, True)


# what is sent


def test_train_sends_its_flags_and_follows_the_job(cli: Any, fake: FakeServer, tmp_path: Path) -> None:
    fake.on("POST", "/api/v1/training-jobs", Reply(JOB, 202))
    fake.on("GET", "/api/v1/jobs/job_1", DONE)
    fake.on(
        "GET", "/api/v1/jobs/job_1/events", page(event(1, "fold", "fold 1 of 5: r2 0.9"), event(2, "log", "unsaid"))
    )
    fake.on("GET", "/api/v1/models/iris/versions/1", VERSION)
    fake.on("GET", "/api/v1/reports/rep_1", REPORT)
    steps = tmp_path / "steps.toml"
    steps.write_text('[[transforms]]\nop = "clip"\ncolumns = "numeric"\nlow = 0\n')
    done = cli(
        "train", "iris", "--dataset", "iris:2", "--target", "species", "--algorithm", "ridge", "--set", "alpha=0.5", "--set", "solver=auto",
        "--kfold", "5", "--gate", "r2>=0.3", "--gate", "rmse<=2e1", "--transforms", str(steps), "--alias", "champion",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert fake.asked[0].json == {
        "model": "iris", "dataset": "iris:2", "target": "species", "algorithm": "ridge", "seed": 0, "alias": "champion",
        "hyperparameters": {"alpha": 0.5, "solver": "auto"}, "validation": {"kfold": 5},
        "gates": [{"metric": "r2", "at_least": 0.3}, {"metric": "rmse", "at_most": 20.0}],
        "transforms": [{"op": "clip", "columns": "numeric", "low": 0}],
    }  # fmt: skip
    assert done.stderr == "fold 1 of 5: r2 0.9\n"
    assert "iris:1" in done.stdout
    assert "true \\ predicted" in done.stdout
    assert "49" in done.stdout


def test_advice_is_shown_and_nothing_else_asked_for(cli: Any, fake: FakeServer) -> None:
    advice = {
        "seconds": 65.0, "fits": 6, "fit_seconds": 10.25, "evaluation_seconds": 2.0, "packaging_seconds": 1.5,
        "memory_mb": 2048.0, "free_mb": 1024.0, "will_fit": False,
        "streamed": False, "rows": 150000, "measured_rows": 20000, "warnings": ["this will hardly fit"], "epochs": 30,
        "batch_size": 64, "micro_batch": 64, "step_ms": 2.5, "parameters": 1234,
    }  # fmt: skip
    fake.on("POST", "/api/v1/training-jobs", Reply(JOB, 202))
    fake.on("GET", "/api/v1/jobs/job_1", {**DONE, "result": {"advice": advice}})
    done = cli("train", "iris", "--dataset", "iris", "--target", "species", "--algorithm", "mlp", "--advise")
    assert done.exit_code == 0, done.stderr
    assert fake.asked[0].json["advise"] is True
    assert "65 s for 6 fits, 10.25 s each, and 3.5 s to evaluate and package" in " ".join(done.stdout.split())
    assert "2,048 MiB, of 1,024 MiB" in done.stdout
    assert done.stderr == "warning: this will hardly fit\n"
    assert len(fake.requests("GET", "/api/v1/models/iris/versions/1")) == 0


def test_a_job_that_fails_is_one_whatever_its_error(cli: Any, fake: FakeServer) -> None:
    error = {
        "message": "accuracy 0.5 is below 0.9",
        "code": "gate_failed",
        "status": 400,
        "param": "gates",
        "detail": {},
    }
    fake.on("POST", "/api/v1/training-jobs", Reply(JOB, 202))
    fake.on("GET", "/api/v1/jobs/job_1", {**JOB, "status": "failed", "error": error})
    fake.on("GET", "/api/v1/jobs/job_1/events", page(event(1, "error", str(error["message"]))))
    train = ("train", "iris", "--dataset", "iris", "--target", "species", "--algorithm", "ridge")
    done = cli(*train)
    assert (done.exit_code, done.stderr) == (1, "error: accuracy 0.5 is below 0.9\n")
    assert cli("jobs", "watch", "job_1").exit_code == 1
    detached = cli(*train, "--detach")
    assert (detached.exit_code, detached.stdout) == (0, "job_1\n")


def test_evaluate_shows_the_report(cli: Any, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/evaluations", Reply(JOB, 202))
    fake.on("GET", "/api/v1/jobs/job_1", DONE)
    fake.on("GET", "/api/v1/jobs/job_1/events", page())
    comparison = {
        "with": "iris:1", "rows": 1, "decided_by": "accuracy", "verdict": "worse",
        "metrics": {"accuracy": {
            "model": 0.92, "other": 0.96, "difference": -0.04, "low": -0.07, "high": -0.01, "p_value": 0.002, "verdict": "worse",
        }},
    }  # fmt: skip
    fake.on("GET", "/api/v1/reports/rep_1", {**REPORT, "details": {"comparison": comparison}})
    fake.on("GET", "/api/v1/reports", page(REPORT))
    done = cli("evaluate", "iris@champion", "--compare", "iris:1")
    assert done.exit_code == 0, done.stderr
    assert fake.asked[0].json == {"model": "iris@champion", "method": {"kfold": 5}, "compare": "iris:1", "seed": 0}
    assert "0.9600 [0.9300, 0.9800]" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "-0.0400 [-0.0700, -0.0100]" in line]
    assert line.split()[:3] == ["accuracy", "0.92", "0.96"]
    assert "iris:2 against iris:1 on 1 row: worse, by accuracy\n" in done.stdout
    assert "iris:2" in cli("reports", "list").stdout
    assert cli("reports", "show", "rep_1").stdout == done.stdout
    gate = {"metric": "accuracy", "at_least": 0.99, "value": 0.96, "passed": False}
    fake.on("GET", "/api/v1/reports/rep_1", {**REPORT, "details": {"gates": [gate]}})
    done = cli("evaluate", "iris", "--gate", "accuracy>=0.99")
    assert (done.exit_code, done.stderr) == (1, "error: the gate failed: accuracy is 0.96 and must be at least 0.99\n")


def test_a_regressions_residuals_are_shown(cli: Any, fake: FakeServer) -> None:
    details = {"residual_quantiles": {"0.05": -91.25, "0.5": 1.5, "0.95": 88.0}}
    fake.on("GET", "/api/v1/reports/rep_1", {**REPORT, "metrics": {"r2": METRICS["accuracy"]}, "details": details})
    lines = cli("reports", "show", "rep_1").stdout.splitlines()
    assert any(line.split() == ["true", "-", "predicted", "p5", "p50", "p95"] for line in lines)
    assert any(line.split() == ["quantile", "-91.25", "1.5", "88"] for line in lines)


def test_upload_corrects_types(cli: Any, fake: FakeServer, tmp_path: Path) -> None:
    fake.on("POST", "/api/v1/datasets", Reply({**DATASET, "warnings": ["column x is constant"]}, 201))
    fake.on("GET", "/api/v1/datasets/iris", {**DATASET, "versions": [1, 2]})
    file = tmp_path / "shops.csv"
    file.write_text("a\n1\n")
    done = cli("data", "upload", str(file), "--column", "zip=category", "--delimiter", "\\t")
    assert done.exit_code == 0, done.stderr
    assert b'{"columns": {"zip": "category"}, "delimiter": "\\t"}' in fake.asked[0].body
    assert b'name="name"\r\n\r\nshops\r\n' in fake.asked[0].body
    assert "column x is constant" in done.stderr
    assert "iris:2: 150 rows, 2 columns, digest 9f86d081884c\n" in done.stdout
    assert cli("data", "upload", "sklearn:iris").exit_code == 0
    assert b'name="name"\r\n\r\niris\r\n' in fake.requests("POST", "/api/v1/datasets")[1].body


def test_an_upload_of_what_an_older_version_has_says_so(cli: Any, fake: FakeServer) -> None:
    fake.on("POST", "/api/v1/datasets", Reply({**DATASET, "rows": 1}, 201))
    fake.on("GET", "/api/v1/datasets/iris", {**DATASET, "versions": [1, 2, 3]})
    done = cli("data", "upload", "sklearn:iris")
    assert done.stdout == "iris:2: 1 row, 2 columns, digest 9f86d081884c, as before; 'iris' means iris:3\n"


@pytest.mark.parametrize(
    ("arguments", "said", "shown"),
    [
        (["data", "upload", "sklearn:iris"], "give schema.header, or schema.columns", "give --header, or --column"),
        (["data", "upload", "sklearn:iris", "--project", "x"], "leave out the header x-project", "leave out --project"),
    ],
    ids=["schema", "project"],
)  # fmt: skip
def test_an_error_names_the_flags_of_the_command(cli: Any, fake: FakeServer, arguments, said, shown) -> None:  # type: ignore[no-untyped-def]
    fake.on("POST", "/api/v1/datasets", problem(400, "no_header", said))
    done = cli(*arguments)
    assert (done.exit_code, done.stderr) == (2, f"error: {shown}\n")


def test_members_are_those_of_the_named_project(cli: Any, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/memberships", page({"user_id": "user_1", "project_id": "proj_2", "role": "viewer"}))
    assert "user_1" in cli("projects", "members", "lab").stdout
    assert fake.asked[0].headers["x-project"] == "lab"
    assert cli("projects", "members").exit_code == 0
    assert "x-project" not in fake.asked[1].headers


def test_an_alias_takes_a_number_or_a_reference(cli: Any, fake: FakeServer) -> None:
    row = {"project_id": "p", "model": "iris", "alias": "prod", "version": 1}
    fake.on("PUT", "/api/v1/models/iris/aliases/prod", row)
    fake.on("GET", "/api/v1/models/iris/versions/1", VERSION)
    for version in ("1", "iris:1"):
        assert cli("models", "alias", "iris", "prod", version).stdout == "iris@prod is iris:1\n"
    assert [one.json for one in fake.requests("PUT", "/api/v1/models/iris/aliases/prod")] == [{"version": 1}] * 2
    done = cli("models", "alias", "iris", "prod", "wine:1")
    assert (done.exit_code, "give its number" in done.stderr) == (2, True)


def test_a_model_shows_its_aliases_and_classes(cli: Any, fake: FakeServer) -> None:
    fake.on("GET", "/api/v1/models/iris/versions/1", {**VERSION, "classes": ["setosa", "virginica"]})
    fake.on("GET", "/api/v1/models/iris", {"name": "iris", "versions": [VERSION], "aliases": {"prod": 1, "old": 2}})
    shown = [line.split(maxsplit=1) for line in cli("models", "show", "iris:1").stdout.splitlines() if line.strip()]
    facts = {line[0]: line[1].strip() for line in shown if len(line) == 2}
    assert (facts["aliases"], facts["classes"]) == ("prod", "setosa, virginica")


def test_the_headline_of_a_regression_is_r2(cli: Any, fake: FakeServer) -> None:
    metrics = {"mae": METRICS["accuracy"], "r2": METRICS["accuracy"]}
    fake.on("GET", "/api/v1/models", page({**VERSION, "task": "tabular-regression", "metrics": metrics}))
    assert "r2 0.9600" in cli("models", "list").stdout


def test_repeats_need_folds(cli: Any) -> None:
    done = cli("evaluate", "iris", "--holdout", "0.2", "--repeats", "3")
    assert (done.exit_code, "--repeats goes with --kfold" in done.stderr) == (2, True)


def test_a_model_of_ones_own_answers_what_it_answers(cli: Any, fake: FakeServer) -> None:
    row = {"label": 1, "probabilities": [0.25, 0.75], "distance": [[1.5], [2.5]], "value": None}
    fake.on("POST", "/api/v1/deployments/own/predict", {**PREDICTION, "outputs": [row]})
    done = cli("predict", "own", "--input", "{}")
    assert done.exit_code == 0, done.stderr
    assert "[0.25, 0.75]" in done.stdout
    assert "[[1.5], [2.5]]" in done.stdout


def test_predict_gives_a_csvs_texts_their_types(cli: Any, fake: FakeServer, tmp_path: Path) -> None:
    fake.on("GET", "/api/v1/deployments/iris", DEPLOYMENT)
    fake.on("POST", "/api/v1/deployments/iris/predict", PREDICTION)
    file = tmp_path / "rows.csv"
    file.write_text("petal,count,wild,place,extra\n1.5,2,true,7,x\n,,no,,\n")
    done = cli("predict", "iris", "--file", str(file))
    assert done.exit_code == 0, done.stderr
    assert fake.asked[1].json == {
        "inputs": [
            {"petal": 1.5, "count": 2, "wild": True, "place": "7"},
            {"petal": None, "count": None, "wild": False, "place": None},
        ]
    }
    assert "setosa" in done.stdout
    assert "0.9800" in done.stdout


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "petal,count\n1,2\n1\n", "line 3"),
        ("rows.csv", "petal\nbig\n", "must be a number"),
        ("rows.jsonl", '{"petal": 1}\n{"petal": \n', "line 2"),
        ("rows.json", "[1]", "JSON object"),
        ("rows.txt", "1", ".jsonl"),
    ],
)
def test_bad_rows_are_named(cli: Any, fake: FakeServer, tmp_path: Path, name: str, content: str, said: str) -> None:
    fake.on("GET", "/api/v1/deployments/iris", DEPLOYMENT)
    (tmp_path / name).write_text(content)
    done = cli("predict", "iris", "--file", str(tmp_path / name))
    assert (done.exit_code, said in done.stderr) == (2, True)


def test_predict_takes_json_and_sends_many_rows_in_parts(cli: Any, fake: FakeServer, tmp_path: Path) -> None:
    fake.on("POST", "/api/v1/deployments/iris/predict", PREDICTION)
    done = cli("predict", "iris", "--input", '{"petal": 1}', "--input", '[{"petal": 2}, {"petal": null}]', "--json")
    assert json.loads(done.stdout)["outputs"] == PREDICTION["outputs"]
    assert fake.asked[0].json == {"inputs": [{"petal": 1}, {"petal": 2}, {"petal": None}]}
    file = tmp_path / "rows.jsonl"
    file.write_text('{"petal": 1}\n' * 1001)
    assert cli("predict", "iris", "--file", str(file)).exit_code == 0
    assert [len(one.json["inputs"]) for one in fake.asked[1:]] == [500, 500, 1]
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    given = ["--parameter", "max_tokens=3", "--parameter", "stop=x", "--parameter", 'tools=[]']
    assert cli("predict", "iris", "--input", json.dumps(rows), *given).exit_code == 0
    params = {"max_tokens": 3, "stop": "x", "tools": []}
    assert [one.json for one in fake.asked[4:]] == [{"inputs": [row], "parameters": params} for row in rows]
    assert cli("predict", "iris", "--input", "{}", "--parameter", "x").exit_code == 2


def test_deploy_waits_and_says_where(cli: Any, fake: FakeServer) -> None:
    fake.on("PUT", "/api/v1/deployments/iris", Reply({**DEPLOYMENT, "status": "creating"}, 202))
    fake.on("GET", "/api/v1/deployments/iris", {**DEPLOYMENT, "status": "creating"}, DEPLOYMENT)
    done = cli("deploy", "iris@champion", "--replicas", "2", "--threads", "1")
    assert done.exit_code == 0, done.stderr
    assert fake.asked[0].json == {"model": "iris@champion", "replicas": {"min": 2}, "resources": {"threads": 1}}
    assert f"{fake.url}/api/v1/deployments/iris/predict" in done.stdout
    done = cli("deploy", "chat:1", "--name", "iris", "--engine", "llama", "--context", "512", "--adapter", "a=b@c", "--no-wait")
    assert (done.exit_code, fake.asked[-1].json) == (
        0, {"model": "chat:1", "engine": "llama", "context": 512, "adapters": {"a": "b@c"}}
    )  # fmt: skip
    done = cli("deploy", "chat:1", "--name", "iris", "--adapter", "a")
    assert (done.exit_code, "NAME=MODEL" in done.stderr) == (2, True)
    fake.on("GET", "/api/v1/deployments/iris", {**DEPLOYMENT, "status": "failed", "message": "parity mismatch"})
    done = cli("deploy", "iris@champion")
    assert (done.exit_code, "parity mismatch" in done.stderr) == (1, True)


def test_a_new_key_alone_goes_to_stdout(cli: Any, fake: FakeServer) -> None:
    made = {"id": "key_1", "project_id": "p", "name": "ci", "role": "invoke-only", "hint": "cret", "key": "mw_secret"}
    fake.on("POST", "/api/v1/keys", Reply(made, 201))
    done = cli("keys", "create", "ci", "--role", "invoke-only", "--deployment", "iris", "--days", "1")
    assert done.stdout == "mw_secret\n"
    assert fake.asked[0].json == {"name": "ci", "role": "invoke-only", "models": ["iris"], "expires_in": 86400.0}
    assert cli("keys", "create", "ci", "--role", "king").exit_code == 2


# the tree itself


def test_every_setting_has_a_flag_on_up() -> None:
    from typer.main import get_command

    flags = {option.name for option in get_command(app).commands["up"].params}  # type: ignore[attr-defined]
    assert set(Settings.model_fields) - {"url", "api_key"} <= flags


def test_the_generated_pages_are_current() -> None:
    from modelworks.cli.reference import DOCS, PAGES

    for name, render in PAGES.items():
        assert (DOCS / name).read_text() == render(), f"docs/{name} is not current: run `make docs`"

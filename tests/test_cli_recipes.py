"""Recipes: what is wrong with one is said by file and key; what is right runs from data to a prediction, twice the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from modelworks.cli.app import app
from modelworks.cli.curl import predict_line
from modelworks.cli.recipe import load
from modelworks.client import Connection
from modelworks.core.errors import InvalidInput
from tests.server import RunningServer

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD = """
name = "shops"
[data]
name = "shops"
source = "shops.csv"
[train]
target = "sales"
algorithm = "ridge"
[train.validation]
kfold = 5
[deploy]
[predict]
inputs = [{ area = 1.0 }]
"""


def written(folder: Path, text: str) -> Path:
    (folder / "shops.csv").write_text("area,sales\n1,2\n")
    path = folder / "shops.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_with_it_are_valid(path: Path) -> None:
    loaded = load(path)
    assert loaded.deployment == {"chat": "smollm2-chat", "embed": "minilm-embed"}.get(path.stem, path.stem)


def test_a_file_is_found_beside_the_recipe(tmp_path: Path) -> None:
    loaded = load(written(tmp_path, GOOD))
    assert loaded.file == tmp_path / "shops.csv"
    assert loaded.training("shops:3").dataset == "shops:3"
    assert load(written(tmp_path, GOOD.replace("shops.csv", "sklearn:iris"))).file is None


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("kfold = 5", "kfold = 1", "train.validation.kfold"),
        ("kfold = 5", "folds = 5", "train.validation.folds"),
        ('algorithm = "ridge"', "", "train.algorithm"),
        ('algorithm = "ridge"', 'algorithm = "ridge"\nmodel = "x"', "train.model"),
        ('name = "shops"\n[data]', '[data]', "name"),
        ('source = "shops.csv"', 'source = "gone.csv"', "data.source"),
        ('source = "shops.csv"', 'source = "shops.csv"\nschema = { columns = { a = "colour" } }', "data.schema.columns.a"),
        ("[deploy]", "[deploy]\nreplicas = { min = 0 }", "deploy.replicas.min"),
        ("[deploy]", '[deploy]\nmodel = "x"', "deploy.model"),
        ("[deploy]", "", "predict"),
        ("inputs = [{ area = 1.0 }]", "inputs = []", "predict.inputs"),
        ("inputs = [{ area = 1.0 }]", "rows = []", "predict.rows"),
        ("[deploy]", "[deploys]", "deploys"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_file_and_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InvalidInput) as caught:
        load(path)
    assert caught.value.param == key
    assert str(path) in caught.value.message
    assert key in caught.value.message


def test_what_is_no_toml_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, 'name = "x\n')
    with pytest.raises(InvalidInput, match="line 1") as caught:
        load(path)
    assert str(path) in caught.value.message
    with pytest.raises(InvalidInput, match="cannot read"):
        load(tmp_path / "gone.toml")


def test_the_curl_line_never_holds_the_key_and_quotes_everything(tmp_path: Path) -> None:
    evil = "'; touch pwned; $(touch pwned) `touch pwned` \x1b"
    home = tmp_path / "it's home"
    home.mkdir()
    (home / "admin.key").write_text("mw_secret\n")
    connection = Connection("http://127.0.0.1:9", "mw_secret", "home", home / "admin.key")
    line = predict_line(connection, "iris", [{evil: evil}])
    assert "mw_secret" not in line
    assert "\x1b" not in line
    echo = 'curl() { for one in "$@"; do printf \'%s\\n\' "$one"; done; }\n'
    shown = subprocess.run(["bash", "-c", echo + line], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    arguments = shown.splitlines()
    assert "Authorization: Bearer mw_secret" in arguments
    assert json.loads(arguments[-1]) == {"inputs": [{evil: evil}]}
    assert not (tmp_path / "pwned").exists()
    assert "$MODELWORKS_API_KEY" in predict_line(Connection("http://x", "mw_secret", "environment"), "iris", [{}])


# against a real server


@pytest.mark.slow
def test_a_local_file_goes_from_csv_to_prediction(running: RunningServer, tmp_path: Path) -> None:
    rows = "".join(f"{area / 10},{['north', 'south'][area % 2]},{area * 3 + area % 2}\n" for area in range(60))
    path = written(
        tmp_path, GOOD.replace("{ area = 1.0 }", '{ area = 1.0, region = "north" }').replace("shops", "cli-shops")
    )
    (tmp_path / "cli-shops.csv").write_text("area,region,sales\n" + rows)
    arguments = ["run", str(path), "--home", str(running.home)]
    first, second = (json.loads(_ok(CliRunner().invoke(app, [*arguments, "--json"]))) for _ in range(2))
    assert len(first["folds"]) == 5
    assert first["new"] == ["dataset cli-shops:1", "model cli-shops:1", "deployment cli-shops, revision 1"]
    assert second["new"] == []
    for key in ("metrics", "url"):
        assert first[key] == second[key]
    assert first["model"]["digest"] == second["model"]["digest"]
    assert first["dataset"]["digest"] == second["dataset"]["digest"]
    assert abs(first["prediction"]["outputs"][0]["value"] - 30) < 3
    story = _ok(CliRunner().invoke(app, arguments))
    for text in ("cli-shops:1", "fold 5 of 5", "mean r2", "nothing new was made", "curl -s", "region"):
        assert text in story
    assert running.key not in story


def _ok(done: Any) -> str:
    assert done.exit_code == 0, done.stderr
    return str(done.stdout)


@pytest.mark.slow
def test_the_demo_stops_cleanly_and_repeats_itself(tmp_path: Path) -> None:
    def demo() -> tuple[dict[str, Any], str]:
        done = subprocess.run(
            [sys.executable, "-m", "modelworks.cli", "demo", "--json", "--home", str(tmp_path / "home")],
            capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
            env={**os.environ, "MODELWORKS_URL": "http://127.0.0.1:1", "MODELWORKS_API_KEY": "mw_other"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stdout + done.stderr

    (first, output), (second, _) = demo(), demo()
    assert first["prediction"]["outputs"][0]["label"] == "setosa"
    assert first["metrics"]["accuracy"]["mean"] == pytest.approx(0.96)
    assert (len(first["new"]), second["new"]) == (3, [])
    assert (first["model"]["digest"], first["metrics"]) == (second["model"]["digest"], second["metrics"])
    assert (tmp_path / "home" / "admin.key").read_text().strip() not in output
    home = str(tmp_path / "home")
    assert [
        one.info["pid"]
        for one in psutil.process_iter(["pid", "cmdline"])
        if home in " ".join(one.info["cmdline"] or [])
    ] == []
    assert not (tmp_path / "home" / "server.json").exists()

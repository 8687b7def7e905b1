"""Row 1: pickle from a request. No route reads one, whatever it is called, and nothing in the package could."""

from __future__ import annotations

import ast
import gzip
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelworks
from tests.threats.conftest import Estate
from tests.threats.hostile_files import pickled, shell_pickled
from tests.threats.walk import Way, guarded, with_json

MEDIA = (
    "application/python-pickle",
    "application/x-pickle",
    "application/vnd.bentoml+pickle",
    "application/octet-stream",
    "application/x-python-serialize",
    "text/plain",
    "pickle",
    "application/json+pickle",
    "application/pickle; charset=application/json",
)
PACKAGE = Path(modelworks.__file__).parent


def test_the_payload_works_where_it_is_loaded(tmp_path: Path) -> None:
    for number, payload in enumerate((pickled, shell_pickled)):
        canary = tmp_path / str(number)
        pickle.loads(payload(canary))
        assert canary.exists()


def test_no_route_takes_a_pickle(estate: Estate, canary: Path) -> None:
    payloads = (pickled(canary), shell_pickled(canary))
    with estate.probe() as probe:
        for way in guarded():
            for number, media in enumerate(MEDIA):
                path, content = way.to(estate.values), payloads[number % 2]
                answer = probe.send(way.method, path, content=content, headers={"content-type": media})
                assert answer.status_code == 415, (str(way), media, answer.text)


def test_a_pickle_that_is_called_json_or_a_form_is_refused(estate: Estate, canary: Path) -> None:
    form = {"content-type": "multipart/form-data; boundary=b"}
    with estate.probe() as probe:
        for way in guarded():
            if way.rule.body == "none":
                continue
            for payload in (pickled(canary), shell_pickled(canary)):
                path = way.to(estate.values)
                headers = form if way.rule.body == "form" else {"content-type": "application/json"}
                answer = probe.send(way.method, path, content=payload, headers=headers)
                assert answer.status_code == 400, (str(way), answer.text)
                packed = {**headers, "content-encoding": "gzip"}
                answer = probe.send(way.method, path, content=gzip.compress(payload), headers=packed)
                assert answer.status_code in (400, 415), (str(way), answer.text)


def test_a_pickle_inside_of_json_is_a_text(estate: Estate, canary: Path) -> None:
    text = shell_pickled(canary).decode()
    with estate.probe() as probe:
        for way in with_json():
            body = way.body()
            if way.rule.operation == "oip.infer":
                body["parameters"] = {"content_type": "pickle", "pickle": text}
                body["inputs"][0]["parameters"] = {"content_type": "pickle"}
                body["inputs"][0]["data"] = [text]
            elif way.rule.operation == "deployments.predict":
                body["inputs"][0]["sepal length (cm)"] = text
            else:
                body["pickle"] = text
            answer = probe.send(way.method, way.to(estate.values), said=text, **way.request(body))
            # a model of OpenAI's API is not on this server
            known = (400, 404) if str(way.rule.operation).startswith("openai.") else (400,)
            assert answer.status_code in known, (str(way), answer.text)


# -- what the package itself could load --------------------------------------------------------------------------------

LOADERS = frozenset({
    "pickle", "_pickle", "cPickle", "pickletools", "joblib", "dill", "cloudpickle", "marshal", "shelve",
    "jsonpickle", "multiprocessing", "copyreg", "yaml", "jinja2", "skops", "keras", "tensorflow", "xmlrpc", "code",
})  # fmt: skip
# torch computes; what of it reads or writes pickles and code is out, under any name
TORCH = frozenset({"load", "save", "hub", "jit", "package", "serialization"})
# templates run in the sandbox only
ALLOWED = frozenset({"jinja2.sandbox", "jinja2.exceptions", "jinja2.ext"})
RUNNERS = frozenset({"eval", "exec", "compile", "__import__", "execfile"})
METHODS = frozenset({"system", "popen", "read_pickle", "to_pickle", "spawnl", "execl", "unsafe_load", "load_module"})
# the only places that import by name, each from a table in the code or from the spec that its own parent gave it
BY_NAME = {"core/registry.py", "serve/replica.py", "api/grpc/lifecycle.py"}

# a net goes from a training to the processes that it starts, over socket pairs that only they have
TO_ITS_CHILDREN = {
    "ml/nets/team.py": {"pickle", "multiprocessing.connection"},
    "ml/nets/peer.py": {"multiprocessing.connection"},
}


def forbidden(source: str, file: str = "") -> Iterator[str]:
    """What in a module could run what a file or a request holds."""
    own = TO_ITS_CHILDREN.get(file, set())
    for node in ast.walk(ast.parse(source)):
        at = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            loaders = (name.name for name in node.names if name.name.split(".")[0] in LOADERS and name.name not in own)
            yield from (f"{at} imports {name}" for name in loaders)
            for name in node.names:
                root, *parts = name.name.split(".")
                if root == "torch" and (TORCH & set(parts) or (name.asname and not parts)):
                    yield f"{at} imports {name.name} as {name.asname}"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in LOADERS and module not in ALLOWED | own and not node.level:
                yield f"{at} imports from {module}"
            names = {*module.split(".")[1:], *(name.name for name in node.names)}
            if module.split(".")[0] == "torch" and TORCH & names:
                yield f"{at} imports from {module}"
        elif isinstance(node, ast.Call):
            yield from (f"{at} {what}" for what in _called(node, file))


def _called(node: ast.Call, file: str) -> Iterator[str]:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    dotted = ast.unparse(node.func).split(".")
    if dotted[0] == "torch" and TORCH & set(dotted):
        yield f"calls {'.'.join(dotted)}"
    if called in RUNNERS and isinstance(node.func, ast.Name):
        yield f"calls {called}"
    if called in METHODS and isinstance(node.func, ast.Attribute):
        yield f"calls .{called}"
    if called == "import_module" and file not in BY_NAME:
        yield "imports by name"
    for keyword in node.keywords:
        unsafe = keyword.arg in ("shell", "allow_pickle", "trust_remote_code")
        if unsafe and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
            yield f"gives {keyword.arg}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.numpy_pickle as n",
        "from torch import load",
        "import torch as t\nt.load('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch\ntorch.jit.load('x')",
        "from torch.hub import load_state_dict_from_url",
        "def f():\n    from dill import loads",
        "from jinja2 import Environment",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "eval('1')",
        "import os\nos.system('x')",
        "import pandas\npandas.read_pickle('x')",
        "from importlib import import_module\nimport_module(name)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert list(forbidden(source))


def test_nothing_in_the_package_loads_code() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    names = [file.relative_to(PACKAGE).as_posix() for file in files]
    found = [what for file, name in zip(files, names, strict=True) for what in forbidden(file.read_text(), name)]
    assert found == []


def test_every_way_has_been_walked() -> None:
    """A test of the tests: the walk sees the whole application."""
    operations = {way.rule.operation for way in guarded()}
    assert len(operations) > 40
    assert all(isinstance(way, Way) and way.rule.operation for way in guarded())

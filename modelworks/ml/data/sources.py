"""Where a dataset comes from: a file or a folder with one, `sklearn:NAME`, `package:DIST/PATH` or an https URL."""

from __future__ import annotations

import csv
import re
from pathlib import Path, PurePosixPath

from modelworks.core.errors import InvalidInput, MissingExtra, NotFound

TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".arrow", ".feather")
# scikit-learn's bundled sets that are tables: the function, and the name of the target's column
SKLEARN = {
    "iris": ("load_iris", "species"),
    "wine": ("load_wine", "cultivar"),
    "breast_cancer": ("load_breast_cancer", "diagnosis"),
    "diabetes": ("load_diabetes", "progression"),
    "digits": ("load_digits", "digit"),
    "linnerud": ("load_linnerud", ""),
}
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]{1,19}):(.*)$", re.DOTALL)
_MAX_SOURCE = 4096


def resolve(source: str, workdir: Path, *, offline: bool = False, folders: bool = False) -> Path:
    """A file on this machine that holds `source`; what is made or fetched goes to `workdir`.

    With `folders`, package:DIST/PATH may name a folder too: a model's.

    InvalidInput for a source that cannot be understood or is refused, NotFound for one that is not there. `offline`
    refuses URLs. Only for sources of the person at this machine: a server must not resolve paths that a request names.
    """
    if len(source) > _MAX_SOURCE or "\x00" in source:
        raise InvalidInput(f"a source has at most {_MAX_SOURCE} characters and no NUL", param="source")
    match = _SCHEME.match(source)
    if match is None:
        return _file(Path(source).expanduser())
    scheme, rest = match[1].lower(), match[2]
    if scheme == "sklearn":
        return _sklearn(rest, workdir)
    if scheme == "package":
        return package_file(rest, folders=folders)
    if scheme == "https":
        return _url(source, workdir, offline)
    if scheme in ("s3", "gs", "gcs", "az", "azure", "abfs", "abfss", "r2"):
        raise InvalidInput(
            f"object stores ({scheme}://) are not yet available as sources; download the object and give its path",
            param="source",
            code="unsupported_source",
        )
    raise InvalidInput(
        f"{scheme}: is not a source that is read; give a path, sklearn:NAME, package:DIST/PATH or an https:// URL",
        param="source",
        code="unsupported_source",
    )


def _file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(item for item in path.iterdir() if item.is_file() and item.suffix.lower() in TABLES)
        if len(found) == 1:
            return found[0]
        what = "no table" if not found else f"{len(found)} tables ({', '.join(item.name for item in found[:5])})"
        raise InvalidInput(f"the folder {path.name!r} has {what}; name one file", param="source")
    if not path.exists():
        raise NotFound(f"there is no file {str(path)[:200]!r}; check the path", param="source")
    if not path.is_file():
        raise InvalidInput(f"{str(path)[:200]!r} is not a regular file; give the path of a table", param="source")
    return path


def _sklearn(name: str, workdir: Path) -> Path:
    """One of scikit-learn's bundled sets as CSV: its feature names, then the target, classes by name."""
    if name not in SKLEARN:
        raise InvalidInput(
            f"sklearn has no bundled table {name[:80]!r}; choose one of {', '.join(SKLEARN)}", param="source"
        )
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingExtra("sklearn: sources need scikit-learn; pip install 'modelworks[train]'") from None
    function, target = SKLEARN[name]
    bunch = getattr(datasets, function)()
    targets = bunch.target.reshape(len(bunch.data), -1).tolist()
    names = [str(name) for name in getattr(bunch, "target_names", ())]
    if target and names:
        targets = [[names[int(value)]] for (value,) in targets]
    out = workdir / f"{name}.csv"
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*bunch.feature_names, *([target] if target else names)])
        # repr of a float is the shortest text that reads back as the same float
        writer.writerows([*row, *last] for row, last in zip(bunch.data.tolist(), targets, strict=True))
    return out


def package_file(rest: str, *, folders: bool = False) -> Path:
    """A file that an installed distribution lists as its own, and that lies where distributions are installed."""
    from importlib.metadata import PackageNotFoundError, distribution

    name, _, inner = rest.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or not inner:
        raise InvalidInput(
            "write package:DIST/PATH, such as package:scikit-learn/sklearn/datasets/data/iris.csv", param="source"
        )
    wanted = PurePosixPath(inner)
    if wanted.is_absolute() or ".." in wanted.parts or "\\" in inner:
        raise InvalidInput("the path in a package: source must stay inside the package", param="source")
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        raise NotFound(f"no distribution {name!r} is installed; pip install it first", param="source") from None
    held = [PurePosixPath(file) for file in installed.files or ()]
    folder = folders and any(wanted in file.parents for file in held)
    if not folder and wanted not in held:
        raise NotFound(
            f"the distribution {name!r} has no file {inner[:200]!r}; look at pip show -f {name}", param="source"
        )
    root = Path(str(installed.locate_file(""))).resolve()
    path = Path(str(installed.locate_file(inner))).resolve()
    if not path.is_relative_to(root) or not (path.is_dir() if folder else path.is_file()):
        raise NotFound(f"the distribution {name!r} has no regular file {inner[:200]!r}", param="source")
    return path


def _url(url: str, workdir: Path, offline: bool) -> Path:
    from modelworks.ml.data.download import download

    if offline:
        raise InvalidInput(
            "this server runs offline and fetches no URLs; download the file and give its path",
            param="source",
            code="offline",
        )
    return download(url, workdir)

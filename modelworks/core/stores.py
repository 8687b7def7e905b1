"""Where a table may point: object stores and folders that the administrator names in a TOML file (`--stores`).

    [media]                                # s3://media-bucket/... in a table, or store://media/...
    at = "s3://media-bucket"               # a bucket, or a prefix of one
    endpoint = "https://minio.example:9000"   # left out: Amazon's
    key = "..."                            # left out with secret: asked without a signature
    secret = "..."

    [scans]                                # store://scans/2024/a.png
    at = "/srv/scans"
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelworks.core.errors import InvalidInput

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MAX_BYTES = 1 << 20


class Store(BaseModel):
    """`at`: s3://BUCKET[/PREFIX], or the absolute path of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    at: str
    endpoint: str | None = None
    region: str = "us-east-1"
    key: str | None = Field(None, repr=False)
    secret: str | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _whole(self) -> Store:
        if not _NAME.fullmatch(self.name):
            raise ValueError("a store's name has 1 to 63 letters, digits, '.', '_' or '-'")
        if self.at.startswith("s3://"):
            if not self.bucket:
                raise ValueError("at names a bucket: s3://BUCKET or s3://BUCKET/PREFIX")
        elif not Path(self.at).is_absolute():
            raise ValueError("at is s3://BUCKET[/PREFIX] or the absolute path of a folder")
        elif self.endpoint or self.key or self.secret:
            raise ValueError("a folder has no endpoint, key or secret")
        if (self.key is None) != (self.secret is None):
            raise ValueError("give key and secret together")
        if self.endpoint and (urlsplit(self.endpoint).scheme not in ("http", "https") or not urlsplit(self.endpoint).hostname):
            raise ValueError("endpoint is an address such as https://minio.example:9000")
        return self

    @property
    def bucket(self) -> str:
        return self.at.removeprefix("s3://").partition("/")[0] if self.at.startswith("s3://") else ""

    @property
    def prefix(self) -> str:
        """Of an object store: what every key in it begins with, "" or ending in "/"."""
        rest = self.at.removeprefix("s3://").partition("/")[2].strip("/") if self.bucket else ""
        return f"{rest}/" if rest else ""


def load(path: Path | None) -> list[Store]:
    """The stores that the file names. InvalidInput says what is wrong with it."""
    if path is None:
        return []
    try:
        data = path.read_bytes()[: _MAX_BYTES + 1]
        if len(data) > _MAX_BYTES:
            raise ValueError("it is larger than a megabyte")
        found = tomllib.loads(data.decode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(f"--stores {path}: it cannot be read as TOML ({reason})", param="stores") from None
    stores = []
    for name, entry in found.items():
        try:
            stores.append(Store.model_validate({"name": name, **entry} if isinstance(entry, dict) else {}))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InvalidInput(
                f"--stores {path}: [{name}] {field}: {str(first['msg']).removeprefix('Value error, ')}", param="stores"
            ) from None
    return stores

"""A whole lifecycle in one file, as users declare it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from modelworks.core.specs import Name, Spec, TableSchema


class DataSource(Spec):
    """Where a recipe's data comes from: `source` is a file, a folder's file, `sklearn:NAME`, `package:DIST/PATH` or an https URL."""

    name: Name
    source: str = Field(description="a file beside the recipe, `sklearn:NAME`, `package:DIST/PATH` or an https URL")
    table: TableSchema | None = Field(None, alias="schema")


class ModelSource(Spec):
    """A model that is there already, in place of data and training."""

    source: str = Field(description="a file beside the recipe, `package:DIST/PATH` or an https URL")
    task: Name | None = Field(None, description="such as text-generation; by default told from the file")
    licence: str | None = Field(None, max_length=200, description="by default what the file says")
    convert: Literal["q8_0"] | None = Field(
        None, description="write a GGUF file of fewer bits anew in 8, which the faster engines read"
    )


class Recipe(Spec):
    """A whole lifecycle in one TOML file: data and training with its evaluation, or a model that is there already;
    then deployment, and a sample prediction.
    """

    name: Name
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**32)
    data: DataSource | None = None
    train: dict[str, Any] | None = Field(
        None, description="a training job without model, dataset and seed, which the recipe fills in"
    )
    model: ModelSource | None = Field(None, description="in place of data and train: a model to import")
    deploy: dict[str, Any] | None = Field(
        None, description="a deployment without model; its `name` is the recipe's by default"
    )
    predict: dict[str, Any] | None = Field(
        None, description="`inputs`: rows to predict once it is deployed; or `messages` for a chat"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Recipe:
        if (self.data is None) != (self.train is None) or (self.data is None) == (self.model is None):
            raise ValueError("give data and train, or model in their place")
        if (self.train or {}).get("advise"):
            raise ValueError("a recipe trains; leave advise out, or ask by `modelworks train --advise`")
        return self

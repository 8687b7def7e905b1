"""What users declare of a deployment: what should be serving under a name, checked before anything runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from modelworks.core.specs import Name, RefText, Resources, Spec


class Replicas(Spec):
    """Between `min` and `max` the number follows the calls under way (those that wait included), up at once, down slowly."""

    min: int = Field(1, ge=1, le=64)
    max: int | None = Field(None, ge=1, le=64, description="by default as `min`: the number is fixed")
    target: float = Field(8.0, gt=0, le=1e6, description="calls under way that one replica is meant for")
    scale_down_s: float = Field(
        60.0, ge=1, le=86400, description="seconds for which fewer replicas must have been enough before one is stopped"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max is not None and self.max < self.min:
            raise ValueError("max must not be below min")
        return self


class Batching(Spec):
    """Which calls run together. `"auto"` is short for `{"auto": true}`."""

    max_batch: int = Field(64, ge=1, le=65536, description="calls that run together at most; with auto 1024")
    max_rows: int = Field(4096, ge=1, le=2**20, description="rows that run together at most")
    wait_ms: float = Field(0.0, ge=0, le=10_000, description="how long an idle replica waits for more; 0 never waits")
    auto: bool = Field(
        False,
        description="measure the model when it is loaded, use the smallest batch that is as fast as any, and adapt",
    )
    p99_ms: float | None = Field(
        None, gt=0, le=600_000, description="the latency in the replica that batches are kept small enough for"
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        if value == "auto":
            value = {"auto": True}
        if isinstance(value, dict) and value.get("auto") is True:
            return {"max_batch": 1024, **value}
        return value


class CallLimits(Spec):
    concurrency: int | None = Field(
        None, ge=1, le=1_000_000, description="calls that a gateway has running at once, over all replicas; others wait"
    )
    queue: int | None = Field(
        None, ge=1, le=1_000_000, description="calls that may wait in a gateway; by default the server's queue_limit"
    )


Failure = Literal["error", "overload", "context", "unsupported"]


class Detour(Spec):
    """A rule by which calls are answered by another deployment of the same task: exactly one of `longer_than` and `on`."""

    to: Name
    longer_than: int | None = Field(
        None, ge=1, le=2**31, description="calls with more bytes of input than this are sent there at once"
    )
    on: list[Failure] = Field(
        [],
        description="calls that failed before anything of their answer came: error (500 and above), overload (its queue "
        "is full), context (the prompt is too long), unsupported (the engine lacks a parameter)",
    )

    @model_validator(mode="after")
    def _one(self) -> Detour:
        if (self.longer_than is None) == (not self.on):
            raise ValueError("give exactly one of longer_than and on")
        return self


class AnswerCache(Spec):
    """Whole answers are kept, by each gateway, and given to the same call again: the same input and parameters."""

    seconds: float = Field(300.0, gt=0, le=86_400, description="how long an answer is kept")
    megabytes: int = Field(16, ge=1, le=1024, description="memory for it in each gateway")


class DeploymentSpec(Spec):
    """What should be serving under a name. The model reference is resolved once, when the spec is written."""

    model: RefText
    replicas: Replicas = Replicas()
    batching: Batching = Field(Batching(), description='a table, or "auto"')
    limits: CallLimits = CallLimits()
    hedge_ms: float | None = Field(
        None, gt=0, le=600_000,
        description="a call without an answer after so long is sent to a second replica too; at most 5 in 100 are",
    )  # fmt: skip
    engine: Literal["auto", "openvino", "llama", "transformers", "vllm"] = Field(
        "auto", description="of a language model; auto: the fastest here that reads its file at full quality"
    )
    context: int | None = Field(
        None, ge=256, le=2**22, description="tokens of one call of a language model, prompt and answer; by default "
        "what its engine holds, at most what it was trained on",
    )  # fmt: skip
    tensor_parallel_size: int | None = Field(
        None, ge=1, le=64, description="GPUs over which each replica of a language model is split, by the engine vllm"
    )  # fmt: skip
    adapters: dict[Name, RefText] = Field(
        {}, max_length=64, examples=[{"pirate": "pirate-lora:1"}],
        description="LoRA adapters of a language model, by the name under which a call asks for one: the OpenAI model "
        "`DEPLOYMENT:NAME`, or the parameter `adapter`",
    )  # fmt: skip
    resources: Resources = Resources()
    routes: list[Detour] = Field([], max_length=8, description="when calls go to other deployments; the first that fits")
    cache: AnswerCache | None = Field(None, description="keep whole answers and give them again; {} for the defaults")

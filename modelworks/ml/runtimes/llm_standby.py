"""OpenVINO, and beside it llama.cpp for the calls that ask for what OpenVINO lacks: one replica, one model file.

The second engine maps the same file. It is loaded when the first such call comes, or at once for LoRA adapters, which
must fit before the deployment is ready.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from modelworks.core.errors import ModelworksError
from modelworks.core.generation import Ask, check_adapter, lacking, read_ask
from modelworks.core.telemetry import logger
from modelworks.core.tensors import Tensor
from modelworks.core.types import Signature
from modelworks.ml.gguf import read_gguf, token_bytes
from modelworks.ml.package import Package
from modelworks.ml.runtimes.llm_llama import MODEL_FILE, LlamaRuntime
from modelworks.ml.runtimes.llm_openvino import CONTEXT, NOBODY, OpenVinoRuntime, Step, Whose

SECOND_SLOTS = 4
SECOND_CACHE = 256 * 1024**2  # bytes of keys and values that the second engine may take, beyond one call's context

log = logger("standby")


class StandbyRuntime:
    """As OpenVinoRuntime; what both lack is refused."""

    fair: ClassVar[bool] = True
    lacks: ClassVar[frozenset[str]] = OpenVinoRuntime.lacks & LlamaRuntime.lacks

    def __init__(self) -> None:
        self.slots = 1
        self._first = OpenVinoRuntime()
        self._second: LlamaRuntime | None = None
        self._theirs: set[Hashable] = set()  # calls of the second engine
        # loads the second engine, then hands it calls and their ends in order
        self._line = ThreadPoolExecutor(1, thread_name_prefix="standby")

    def load(
        self,
        package: Package,
        threads: int,
        *,
        slots: int,
        context: int | None = None,
        adapters: Mapping[str, Package] | None = None,
    ) -> Signature:
        self._package, self._threads, self._adapters = package, threads, adapters or {}
        self._context = context or CONTEXT
        signature = self._first.load(package, threads, slots=slots, context=context)
        self.slots = self._first.slots
        if self._adapters:
            self._second = self._loaded()
        return signature

    @property
    def waiting(self) -> int:
        return self._first.waiting

    def admit(
        self, call_id: Hashable, inputs: list[Tensor], params: dict[str, Any], stream: bool, whose: Whose = NOBODY
    ) -> None:
        ask = read_ask(inputs, params, self.lacks)
        check_adapter(ask, self._adapters)
        if lacking(ask, OpenVinoRuntime.lacks) is None:
            self._first.begin(call_id, ask, stream, whose)
        elif refusal := lacking(ask, LlamaRuntime.lacks):
            raise refusal
        else:
            self._theirs.add(call_id)
            self._line.submit(self._hand_over, call_id, ask, stream)

    def step(self, timeout: float) -> list[Step]:
        found = self._first.step(timeout)
        self._theirs.difference_update(call_id for call_id, _, done in found if done)
        return found

    def abort(self, call_id: Hashable) -> None:
        if call_id in self._theirs:
            self._line.submit(self._call_back, call_id)
        else:
            self._first.abort(call_id)

    def __len__(self) -> int:
        return len(self._first) + len(self._theirs)

    def close(self) -> None:
        self._line.shutdown(wait=True)
        if self._second is not None:
            self._second.close()
        self._first.close()

    # in the line's thread

    def _hand_over(self, call_id: Hashable, ask: Ask, stream: bool) -> None:
        try:
            if self._second is None:
                self._second = self._loaded()
            self._second.begin(call_id, ask, stream)
        except Exception as error:  # a plug's edge: the call must not hang
            if not isinstance(error, ModelworksError):
                log.error("second_engine_failed", exc_info=error)
                said = "the engine for this parameter could not be started; the deployment's log has the cause"
                error = ModelworksError(said, code="model_error")
            self._first.events.put((call_id, error, True))

    def _call_back(self, call_id: Hashable) -> None:
        if self._second is not None:
            self._second.abort(call_id)

    def _loaded(self) -> LlamaRuntime:
        found = LlamaRuntime(self._first.events)
        per_call = self._context * (token_bytes(read_gguf(self._package.path(MODEL_FILE))) or 65_536)
        slots = max(1, min(SECOND_SLOTS, SECOND_CACHE // per_call))
        found.load(self._package, self._threads, slots=slots, context=self._context, adapters=self._adapters)
        log.info("second_engine", engine="llama", slots=slots)
        return found

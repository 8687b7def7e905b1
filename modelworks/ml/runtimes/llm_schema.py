"""A JSON schema as a grammar that engines sample by (llguidance's), checked before the engine sees it."""

from __future__ import annotations

import json
from typing import Any

from modelworks.core.errors import InvalidInput, MissingExtra

MAX_REASON = 300


def compile_schema(schema: dict[str, Any], param: str = "response_format") -> str:
    """The grammar. InvalidInput, with the reason, for a schema that cannot be enforced: engines may ignore such a one.

    The text has no white space between its tokens, in which a small model may lose itself. `oneOf` is enforced as
    `anyOf`; keywords that a grammar cannot hold (`not`, `uniqueItems`...) are refused.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise MissingExtra("answers by a JSON schema need llguidance; pip install 'modelworks[llm]'") from None
    guided = {**schema, "x-guidance": {"coerce_one_of": True, "whitespace_flexible": False}}
    grammar = "%llguidance {}\nstart: %json " + json.dumps(guided)
    reason = LLMatcher.validate_grammar(grammar)
    if reason:
        words = reason.partition("JSON schema: ")[2] or reason
        said = " ".join(words.split("\n   1 |")[0].split())[:MAX_REASON]
        raise InvalidInput(f"this JSON schema cannot be enforced: {said}", code="invalid_schema", param=param)
    return grammar

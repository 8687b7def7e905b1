"""What a model's text means: reasoning, answer and calls of tools, as the template families write them. Pure.

Read are: Hermes, Qwen and ChatML (`<tool_call>` with JSON, or with `<function=...>`), Llama 3 (`<|python_tag|>`, bare
JSON, `<function=name>`), Mistral (`[TOOL_CALLS]`, with `[ARGS]` or a list), and plain JSON that names a known tool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from modelworks.core.errors import InvalidInput
from modelworks.core.generation import MAX_SCHEMA, MAX_TOOLS, check_schema

_NAME = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")
_ENDS = {"<tool_call>": "</tool_call>", "<function=": "</function>", "[TOOL_CALLS]": "", "<|python_tag|>": ""}
_XML = re.compile(r"<function=([^>\s]{1,64})>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]{1,200})>\n?(.*?)\n?</parameter>", re.DOTALL)
_MISTRAL = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*(?:\[CALL_ID\][A-Za-z0-9]{1,32})?(?:\[ARGS\])?\s*(?=\{)")
_MOST = 16  # calls that one answer may be held to


class ToolCall(NamedTuple):
    name: str
    arguments: str  # JSON


class Piece(NamedTuple):
    kind: Literal["text", "reasoning", "call"]
    text: str = ""
    call: ToolCall | None = None


class Reader:
    """Takes an answer's text as it comes. `tools`: the names that may be called; `forced`: it is calls and nothing else."""

    def __init__(self, tools: list[str] | None = None, *, forced: bool = False) -> None:
        self._tools = tools or []
        self._forced = forced
        self._buffer = ""
        self._state: Literal["start", "think", "text", "call", "held"] = "start"
        self._marker = ""
        self._thought = False

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        found: list[Piece] = []
        while getattr(self, f"_{self._state}")(found):
            pass
        return found

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the text."""
        rest, self._buffer = self._buffer, ""
        if self._state == "think":
            return [Piece("reasoning", rest)] if rest else []
        if self._state == "call":
            return self._calls(rest[len(self._marker) :], rest)
        if self._state == "held":
            calls = list(_plain(rest, self._tools))
            if calls:
                return [Piece("call", call=call) for call in calls]
        return [Piece("text", rest)] if rest else []

    # each state's step: True when there may be more to do

    def _start(self, found: list[Piece]) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        if not self._thought and "<think>".startswith(text[:7]):
            if len(text) < 7:
                return False
            self._buffer, self._state, self._thought = text[7:], "think", True
            return True
        if self._thought:
            self._buffer = text
        if self._forced:
            self._state = "held"
        elif self._tools:
            if any(marker.startswith(text) for marker in (*_ENDS, "```")):
                return False  # it may become one
            marked = text.startswith(tuple(_ENDS))
            self._state = "held" if not marked and text.startswith(("{", "[", "```")) else "text"
        else:
            self._state = "text"
        return True

    def _think(self, found: list[Piece]) -> bool:
        before, mark, after = self._buffer.partition("</think>")
        if mark:
            self._buffer, self._state = after, "start"
        else:
            keep = _overlap(before, ("</think>",))
            before, self._buffer = before[: len(before) - keep], before[len(before) - keep :]
        if before:
            found.append(Piece("reasoning", before))
        return bool(mark)

    def _text(self, found: list[Piece]) -> bool:
        text = self._buffer
        if not self._tools:
            self._buffer = ""
            if text:
                found.append(Piece("text", text))
            return False
        places = [(place, marker) for marker in _ENDS if (place := text.find(marker)) >= 0]
        place = min(places)[0] if places else len(text) - _overlap(text, tuple(_ENDS))
        if before := text[:place]:
            found.append(Piece("text", before))
        self._buffer = text[place:]
        if places:
            self._marker, self._state = min(places)[1], "call"
        return bool(places)

    def _call(self, found: list[Piece]) -> bool:
        end = _ENDS[self._marker]
        place = self._buffer.find(end) if end else -1
        if place < 0:
            return False
        whole, rest = self._buffer[: place + len(end)], self._buffer[place + len(end) :]
        found += self._calls(whole[len(self._marker) : place], whole)
        self._buffer, self._state = rest.lstrip("\n"), "text"
        return True

    def _held(self, found: list[Piece]) -> bool:
        return False

    def _calls(self, body: str, whole: str) -> list[Piece]:
        calls = list(_marked(self._marker, body))
        return [Piece("call", call=call) for call in calls] or [Piece("text", whole)]


def _overlap(text: str, markers: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a marker."""
    longest = max(len(marker) for marker in markers) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0


def _marked(marker: str, body: str) -> Iterator[ToolCall]:
    if marker == "<function=" or "<function=" in body:
        for name, inner in _XML.findall(("<function=" if marker == "<function=" else "") + body):
            parameters = {key: _value(value) for key, value in _PARAMETER.findall(inner)}
            given: Any = parameters or next(_values(inner), {})
            yield ToolCall(name, json.dumps(given, ensure_ascii=False))
    elif marker == "[TOOL_CALLS]" and not body.lstrip().startswith(("[{", "{", "[ {")):
        for piece in body.split("[TOOL_CALLS]"):
            named = _MISTRAL.match(piece)
            if named is not None and (rest := list(_values(piece[named.end() :]))):
                yield ToolCall(named[1], json.dumps(rest[0], ensure_ascii=False))
    else:
        yield from (call for value in _values(body) if (call := _as_call(value)))


def _plain(text: str, tools: list[str]) -> Iterator[ToolCall]:
    """The calls in JSON without a marker; nothing unless all of it is calls of known tools."""
    text = text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0] or text
    calls = [_as_call(value) for value in _values(text)]
    if all(call is not None and call.name in tools for call in calls):
        yield from (call for call in calls if call)


def _values(text: str) -> Iterator[Any]:
    """The JSON values that stand one after the other in `text`, those of lists each; ends where it is not JSON."""
    place = 0
    while place < len(text):
        if text[place].isspace() or text[place] in ";,":
            place += 1
            continue
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return
        yield from value if isinstance(value, list) else [value]


def _no_constant(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _as_call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name, arguments)


def _value(text: str) -> Any:
    found = list(_values(text))
    return found[0] if len(found) == 1 and not isinstance(found[0], str) else text


# what a request says of tools


class Tools(NamedTuple):
    """`shown`: for the chat template; `names`: what may be called; `schema`: what the whole answer is held to."""

    shown: list[dict[str, Any]]
    names: list[str]
    schema: dict[str, Any] | None = None


def read_tools(tools: Any, choice: Any, *, parallel: bool = True, format: dict[str, Any] | None = None) -> Tools:
    """`tools` and `tool_choice` as chat completions have them; `format`: the JSON schema of an answer without calls.

    InvalidInput names what is wrong. With tool_choice required or a named function the schema allows calls alone.
    """
    shown = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(_list(tools))]
    names = [tool["function"]["name"] for tool in shown]
    if len(set(names)) != len(names):
        raise InvalidInput("two tools have the same name", param="tools")
    if len(json.dumps(shown)) > MAX_SCHEMA:
        raise InvalidInput(f"the tools have more than {MAX_SCHEMA} characters", param="tools")
    wanted = _choice(choice, names)
    if not shown or wanted == "none":
        return Tools([], [], format)
    if wanted == "auto":
        if format is None:
            return Tools(shown, names)
        return Tools(shown, names, _either(_call_schemas(shown), format))
    chosen = [tool for tool in shown if wanted in ("required", tool["function"]["name"])]
    one = _either(_call_schemas(chosen))
    if parallel and wanted == "required":
        definitions = one.pop("$defs")
        one = {"type": "array", "items": one, "minItems": 1, "maxItems": _MOST, "$defs": definitions}
    return Tools(shown, [tool["function"]["name"] for tool in chosen], one)


def _list(tools: Any) -> list[Any]:
    if tools is None:
        return []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise InvalidInput(f"tools must be a list of at most {MAX_TOOLS} tools", param="tools")
    return tools


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise InvalidInput(f'{where} must be {{"type": "function", "function": {{"name": ...}}}}', param=where)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidInput(f"{where}.function.name has 1 to 64 letters, digits, _ . or -", param=where)
    if parameters is not None:
        check_schema(parameters, f"{where}.function.parameters")
    shown: dict[str, Any] = {"name": name}
    if isinstance(function.get("description"), str):
        shown["description"] = function["description"]
    shown["parameters"] = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": shown}


def _choice(choice: Any, names: list[str]) -> str:
    """auto, none, required or a tool's name."""
    if choice is None:
        return "auto"
    if choice in ("auto", "none", "required"):
        if choice == "required" and not names:
            raise InvalidInput("tool_choice is required, but there are no tools", param="tool_choice")
        return str(choice)
    name = None
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = choice["function"].get("name") if isinstance(choice.get("function"), dict) else choice.get("name")
    if not isinstance(name, str):
        raise InvalidInput(
            'tool_choice must be auto, none, required or {"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if name not in names:
        raise InvalidInput(f"tool_choice names {name[:80]!r}, which is not among the tools", param="tool_choice")
    return name


def _call_schemas(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": {"type": "object", **tool["function"]["parameters"]},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]


def _either(calls: list[dict[str, Any]], answer: dict[str, Any] | None = None) -> dict[str, Any]:
    """One of `calls`, or an `answer`: each becomes a definition, and what it refers to in itself moves with it."""
    # what a tool's parameters refer to begins at these, not at the call
    definitions = {f"c{at}": _moved(call, f"#/$defs/c{at}/properties/arguments") for at, call in enumerate(calls)}
    if answer is not None:
        definitions["answer"] = _moved(answer, "#/$defs/answer")
    refs = [{"$ref": f"#/$defs/{name}"} for name in definitions]
    return {**(refs[0] if len(refs) == 1 else {"anyOf": refs}), "$defs": definitions}


def _moved(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_moved(one, place) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: place + one[1:] if key == "$ref" and isinstance(one, str) and one.startswith("#") else _moved(one, place)
        for key, one in value.items()
    }

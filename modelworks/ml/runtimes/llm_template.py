"""A model's chat template: messages in, the prompt's text out. It is rendered in a limited process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from modelworks.core.errors import InvalidInput, MissingExtra, ModelworksError
from modelworks.core.settings import child_environment

MAX_TEMPLATE = 256 * 1024  # characters
_SCRIPT = Path(__file__).with_name("llm_render.py")
_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
CHATML = (
    "{% for message in messages %}"
    + _TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatTemplate:
    """`source` is Jinja. InvalidInput when it does not compile. `render` may be called by several threads.

    `mark`: of a vision model, the text that stands for an image where the template takes contents as texts only.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", mark: str = "") -> None:
        if len(source) > MAX_TEMPLATE:
            raise InvalidInput(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are taken",
                code="bad_chat_template",
            )
        self._first = {"template": source, "bos": bos, "eos": eos}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._mark = mark
        self._parts = False  # contents are lists of parts to it
        with self._lock:
            self._start()
        if mark:
            self._parts = self._takes_parts()

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt for `messages`. InvalidInput when the template refuses them, or is stopped at its limits.

        A template that knows no tools gets them, and what was called before, as text in Hermes' form.
        """
        source = self._first["template"]
        known = "tool_calls" in source
        messages = [_with_objects(message) for message in messages] if known else _calls_as_text(messages)
        if tools and "tools" not in source:
            messages, tools = _with_tools(messages, tools), None
        if self._mark:
            messages = [_with_parts(message) if self._parts else _with_marks(message, self._mark) for message in messages]
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            return str(self._ask({"messages": messages, "tools": tools})["text"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _takes_parts(self) -> bool:
        """Whether a text in a part comes out as it is, and by the part's own words."""
        part = {"type": "text", "text": "Hello"}
        with self._lock:
            try:
                text = str(self._ask({"messages": [{"role": "user", "content": [part]}], "tools": None})["text"])
            except InvalidInput:
                return False
        return "Hello" in text and "'type'" not in text and '"type"' not in text

    def _start(self) -> None:
        self._stop()
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
            start_new_session=True,
        )
        self._ask(self._first)

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except OSError:
            line = b""
        if not line:
            self._stop()
            raise InvalidInput(
                "the model's chat template was stopped: it takes too long or too much memory for these messages",
                code="bad_chat_template",
                param="messages",
            )
        answer: dict[str, Any] = json.loads(line)
        if reason := answer.get("error"):
            if reason.startswith("ModuleNotFoundError"):
                raise MissingExtra("chat templates need Jinja; pip install 'modelworks[llm]'")
            if reason.startswith("MemoryError"):
                self._stop()
            raise InvalidInput(
                f"the model's chat template refuses this: {reason}", code="bad_chat_template", param="messages"
            )
        return answer


def reasoning_prefix(prompt: str) -> str:
    """What the answer's text must begin with, for the edge to tell reasoning from answer: the prompt may have opened it."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


_TOOLS = """# Tools

You may call one or more functions to assist with the user query. They are, as JSON schemas:
<tools>
{tools}
</tools>

For each function call, return a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function name>, "arguments": <arguments as a JSON object>}}
</tool_call>"""


def _with_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools in the system's message."""
    text = _TOOLS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _calls_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if found and found[-1].get("responses"):  # templates want user and assistant in turn
                found[-1]["content"] += "\n" + text
            else:
                found.append({"role": "user", "content": text, "responses": True})
        elif message.get("tool_calls"):
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in _with_objects(message)["tool_calls"]]
            text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
            found.append({"role": "assistant", "content": f"{message['content']}\n{text}".strip()})
        else:
            found.append(message)
    return found


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments as objects: templates write them as JSON themselves."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        try:
            arguments = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = call["function"]["arguments"]
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Contents as parts; the images themselves are not the template's."""
    content = message["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    return {**message, "content": [{"type": "image"} if part["type"] == "image_url" else part for part in parts]}


def _with_marks(message: dict[str, Any], mark: str) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(mark if part["type"] == "image_url" else part["text"] for part in content)}


def check_template(source: str, *, bos: str = "", eos: str = "") -> None:
    """InvalidInput unless `source` compiles and renders a short conversation and a long one within its limits."""
    short = [{"role": "user", "content": "Hello"}]
    long = [{"role": role, "content": "word " * 50} for _ in range(50) for role in ("user", "assistant")]
    template = ChatTemplate(source, bos=bos, eos=eos)
    try:
        for messages in (short, [*long, *short]):
            template.render(messages)
    except ModelworksError as error:
        raise InvalidInput(f"the model file's chat template is not usable: {error.message}", code=error.code) from None
    finally:
        template.close()

"""The process that renders chat templates: a script of the standard library and Jinja alone, started by llm_template.

One JSON object a line: first {"template", "bos", "eos"}, answered {"ok": true}; then {"messages", "tools"}, answered
{"text"}.
A template is data from a model file. It runs in Jinja's immutable sandbox, and what the sandbox does not bound - time
and memory - the kernel does: a render that takes longer than SECONDS or more than MEMORY ends this process.
"""

import json
import resource
import signal
import sys
from datetime import datetime

SECONDS = 1.0
MEMORY = 512 * 1024**2
MAX_TEXT = 4 * 1024**2


def main() -> None:
    """Serve until stdin ends."""
    _limit()
    first = json.loads(sys.stdin.readline())
    try:
        render = _compile(first["template"], {"bos_token": first["bos"], "eos_token": first["eos"]})
    except Exception as error:  # whatever a hostile template raises is its own failure
        _answer(error=_words(error))
        return
    _answer(ok=True)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            text = render(asked["messages"], asked.get("tools"))
        except Exception as error:  # as above
            _answer(error=_words(error))
        else:
            _answer(text=text)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process


def _compile(source, names):
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(str(message)[:500])

    def strftime_now(pattern):
        return datetime.now().strftime(pattern)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, **names)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    template = environment.from_string(source)
    signal.setitimer(signal.ITIMER_REAL, 0)

    def render(messages, tools):
        pieces, size = [], 0
        for piece in template.generate(messages=messages, tools=tools or None, add_generation_prompt=True):
            size += len(piece)
            if size > MAX_TEXT:
                raise TemplateError(f"it makes more than {MAX_TEXT} characters")
            pieces.append(piece)
        return "".join(pieces)

    return render


def _words(error):
    return f"{type(error).__name__}: {str(error)[:300]}"


def _answer(**body):
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

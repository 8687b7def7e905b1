"""Whose prompt is read next, turn by turn."""

from __future__ import annotations

from modelworks.ml.runtimes.llm_line import AGED, Line


class Prompt:
    since = 0

    def __init__(self, name: str, unread: int, key: str = "k", priority: int = 1) -> None:
        self.name, self.unread, self.key, self.priority = name, unread, key, priority
        self.cost = unread


def read_all(line: Line[Prompt], step: int = 256, fits: int = 10**9) -> list[str]:
    """The names in the order in which their prompts are read to the end."""
    ended = []
    while len(line):
        line.turn()
        left = step
        while left and (call := line.next(lambda call: call.unread <= fits)) is not None:
            piece = min(left, call.unread)
            left, call.unread = left - piece, call.unread - piece
            if not call.unread:
                line.remove(call)
                ended.append(call.name)
        if left == step:
            break
    return ended


def fill(*prompts: Prompt) -> Line[Prompt]:
    line: Line[Prompt] = Line()
    for prompt in prompts:
        line.push(prompt)
    return line


def test_short_prompts_go_first_and_priorities_before_them() -> None:
    line = fill(Prompt("long", 4000), Prompt("short", 20), Prompt("later", 10, priority=2), Prompt("mid", 500))
    assert read_all(line) == ["short", "mid", "long", "later"]


def test_a_short_prompt_comes_between_the_pieces_of_one_that_has_begun() -> None:
    line = fill(Prompt("long", 4000))
    line.turn()
    assert line.next(lambda _: True) is line.begun[0]
    line.begun[0].unread -= 256
    line.push(Prompt("short", 20))
    assert read_all(line) == ["short", "long"]


def test_keys_have_turns_whatever_they_have_waiting() -> None:
    line = fill(*(Prompt(f"a{at}", 100, "a") for at in range(6)), Prompt("b0", 200, "b"), Prompt("b1", 200, "b"))
    assert read_all(line)[:4] == ["a0", "b0", "a1", "a2"]


def test_a_long_prompt_is_not_behind_short_ones_for_ever() -> None:
    line = fill(Prompt("long", 20 * AGED))
    ended: list[str] = []
    for turn in range(40):
        line.push(Prompt(f"short{turn}", 10))
        line.turn()
        call = line.next(lambda _: True)
        assert call is not None
        call.unread -= min(call.unread, 256)
        if not call.unread:
            line.remove(call)
            ended.append(call.name)
    assert ended.index("long") == 20


def test_what_does_not_fit_waits_and_lets_nobody_pass() -> None:
    line = fill(Prompt("big", 300), Prompt("huge", 900))
    assert read_all(line, fits=500) == ["big"]
    assert [call.name for call in line.waiting] == ["huge"]

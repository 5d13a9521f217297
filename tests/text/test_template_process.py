"""Templates that want too much, and processes that end: always one line, and the next rendering is right."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paceline.errors import BackendError, PacelineError, PromptError
from paceline.text import ChatTemplate, template_process
from tests.fixtures.processes import Interrupts

MESSAGES = [{"role": "user", "content": "hi"}]
ECHO = "{{ messages[0].content }}"


def process_of(template: ChatTemplate) -> subprocess.Popen[bytes]:
    template.check()
    return template._process._process


def message(name: str) -> str:
    """A template that fails only on messages that say so."""
    return "{% if messages[0].content == 'bomb' %}" + BOMBS[name] + "{% endif %}" + ECHO


BOMBS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a number that is never done": "{{ 10**(10**10) }}",
    "sorting": "{% for a in range(99999) %}{% set b = range(99999)|sort(reverse=true) %}{% endfor %}",
    "text without end": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "indent": "{{ [[1]]|tojson(indent=10**10) }}",
    "doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "block": "{% set n = namespace(s='a') %}{% for a in range(99) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = t %}{% endfor %}",
    "center": "{{ 'a'.center(10**11) }}",
    "replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**6) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as x %}",
    "long reason": "{{ raise_exception('x' * 5000000) }}",
}
LOADS = {
    "nested for": "{% for a in b %}" * 25 + "{% endfor %}" * 25,
    "nested if": "{% if a %}" * 120 + "{% endif %}" * 120,
    "digits": "{{ " + "7" * 5000 + " }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "folded": "{{ 10**(10**10) }}{{ 'a' * 10**11 }}",
    "unknown tag": "{% nonsense %}",
    "large": "a" * (2 << 20),
}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1)  # what is tested is that there is a limit


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.usefixtures("brief")
def test_bombs(name: str) -> None:
    template = ChatTemplate(message(name), {})
    for _ in range(2):
        with pytest.raises(PacelineError) as caught:
            template.render([{"role": "user", "content": "bomb"}])
        assert "--raw" in str(caught.value) or "download it again" in str(caught.value)
        if isinstance(caught.value, PromptError):
            assert template.render(MESSAGES) == "hi"


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
@pytest.mark.usefixtures("brief")
def test_templates_that_cannot_be_compiled(name: str) -> None:
    def use() -> None:
        template = ChatTemplate(LOADS[name], {}, "folder/x.jinja")
        template.check()
        template.render(MESSAGES)

    with pytest.raises(PacelineError, match=r"^folder/x.jinja .*download it again|--raw"):
        use()


@pytest.mark.usefixtures("brief")
def test_a_limit_ends_the_process_and_the_next_rendering_starts_another() -> None:
    template = ChatTemplate(message("nested ranges"), {})
    first = process_of(template)
    with pytest.raises(PromptError, match="takes more than 1 seconds; shorten"):
        template.render([{"role": "user", "content": "bomb"}])
    assert first.returncode is not None
    assert template.render(MESSAGES) == "hi"


def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MEMORY", 1 << 27)
    template = ChatTemplate(message("center"), {})
    with pytest.raises(PromptError, match="more than 128 MB of memory"):
        template.render([{"role": "user", "content": "bomb"}])
    assert template.render(MESSAGES) == "hi"


def test_a_process_that_was_killed_is_replaced() -> None:
    template = ChatTemplate(ECHO, {})
    for _ in range(3):
        process = process_of(template)
        process.kill()
        process.wait()
        assert template.render(MESSAGES) == "hi"


def test_several_threads() -> None:
    template, wrong = ChatTemplate(ECHO, {}), []

    def use(number: int) -> None:
        for i in range(50):
            text = f"{number} {i}"
            wrong.extend([text] if template.render([{"content": text}]) != text else [])

    threads = [threading.Thread(target=use, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_interrupts_leave_it_whole() -> None:
    template, dice, raised = ChatTemplate(ECHO, {}), random.Random(1), 0
    for i in range(300):
        interrupts = Interrupts(dice.randint(1, 600))
        text = interrupts.run(lambda i=i: template.render([{"content": f"interrupted {i}"}]))
        assert text in (None, f"interrupted {i}")
        raised += interrupts.raised
        assert template.render([{"content": f"right {i}"}]) == f"right {i}"
    assert raised > 100


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate(ECHO, {})
    process = process_of(template)
    del template
    gc.collect()
    assert process.returncode is not None  # and was waited for


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_the_interpreter(busy: bool) -> None:
    program = (
        "import threading, time\nfrom paceline.text import ChatTemplate\n"
        "t = ChatTemplate('{% for a in range(x) %}{% for b in range(x) %}{% endfor %}{% endfor %}', {})\n"
        "t.check(); print(t._process._process.pid, flush=True)\n"
        "def use():\n    try: t.render([], x=99999)\n    except Exception as error: print(type(error).__name__)\n"
    )
    if busy:
        program += "for _ in range(3): threading.Thread(target=use, daemon=True).start()\ntime.sleep(0.3)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout.split()[0]), 0)


def test_the_process_ends_when_the_interpreter_is_killed() -> None:
    program = (
        "import os\nfrom paceline.text import ChatTemplate\nt = ChatTemplate('', {})\n"
        "t.check(); print(t._process._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    until = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}").exists() and _state(done.stdout.strip()) != "Z":
        assert time.monotonic() < until
        time.sleep(0.01)


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_a_forked_child_is_told_and_the_parent_goes_on() -> None:
    template = ChatTemplate(ECHO, {})
    assert template.render(MESSAGES) == "hi"
    child = os.fork()
    if child == 0:
        try:
            template.render(MESSAGES)
        except BackendError:
            del template
            gc.collect()
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert template.render(MESSAGES) == "hi"


def test_without_python_only_raw_text_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("", "/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        template = ChatTemplate(ECHO, {})
        template.check()
        with pytest.raises(PromptError, match=r"cannot be started .*--raw"):
            template.render(MESSAGES)


def test_values_that_are_none_of_json() -> None:
    template = ChatTemplate(ECHO, {})
    circle: list[object] = []
    circle.append(circle)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value, kind in ((b"x", "bytes"), ({1}, "set"), (circle, "Circular"), (deep, "recursion"), ({1: 2}, "key 1")):
        with pytest.raises(PromptError, match=kind):
            template.render([{"content": value}])
    assert template.render(MESSAGES) == "hi"


@pytest.mark.parametrize("text", ["\ud800", "\ud83d\ude00", "😀\n\r\u2028\x00", "a" * 3_000_000])
def test_every_text_survives(text: str) -> None:
    assert ChatTemplate(ECHO, {}).render([{"content": text}]) == text

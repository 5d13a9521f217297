"""The engine among the events of a process: interrupts, threads, coroutines, fork and exit."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest

import paceline
from paceline.errors import BackendError, PacelineError
from tests.fixtures.processes import Interrupts, assert_quiet, in_child

PROMPTS = ["def fibonacci(n):", "class Stack:", "import os\n", "for i in range(10):", "# Sort a list\n", "x ="]
SETTINGS: dict[str, Any] = {"raw": True, "max_tokens": 24}


def sampling(seed: int) -> paceline.SamplingParams:
    return paceline.SamplingParams(temperature=0.8 if seed % 2 else 0.0, seed=seed)


@pytest.fixture(scope="module")
def engine() -> paceline.Engine:
    return paceline.load("tiny-python", slots=3, threads=2, context=128, cache_memory=1 << 22)


@pytest.fixture(scope="module")
def texts(engine: paceline.Engine) -> list[str]:
    """What each prompt gives when nothing happens meanwhile; the seed is the prompt's number."""
    return [engine.generate(p, sampling=sampling(i), **SETTINGS).text for i, p in enumerate(PROMPTS)]


def use(engine: paceline.Engine, number: int, *, streamed: bool) -> str:
    prompt, settings = PROMPTS[number], {"sampling": sampling(number), **SETTINGS}
    if not streamed:
        return engine.generate(prompt, **settings).text
    with engine.stream(prompt, **settings) as stream:
        return "".join(event.text for event in stream)


def interrupted(engine: paceline.Engine, texts: list[str], count: int) -> None:
    dice = random.Random(0)
    raised = 0
    beside = engine.stream(PROMPTS[0], sampling=sampling(0), **SETTINGS)
    heard = ""
    for _ in range(count):
        number = dice.randrange(len(PROMPTS))
        interrupts = Interrupts(dice.choice((dice.randrange(1, 400), dice.randrange(1, 4000))))
        text = interrupts.run(lambda number=number: use(engine, number, streamed=dice.random() < 0.5))
        raised += interrupts.raised
        assert text in (None, texts[number])
        if dice.random() < 0.2:
            number = dice.randrange(len(PROMPTS))
            assert use(engine, number, streamed=dice.random() < 0.5) == texts[number]
        event = next(beside, None)  # of a stream in flight all the while
        heard += event.text if event else ""
        if event is None:
            assert heard == texts[0]
            beside, heard = engine.stream(PROMPTS[0], sampling=sampling(0), **SETTINGS), ""
    beside.close()
    assert raised > count // 2
    for number, text in enumerate(texts):
        assert use(engine, number, streamed=True) == text
    assert not engine.scheduler.busy


def test_interrupts_leave_the_engine_whole(engine: paceline.Engine, texts: list[str]) -> None:
    interrupted(engine, texts, 100)


@pytest.mark.slow
def test_two_thousand_interrupts_leave_the_engine_whole(engine: paceline.Engine, texts: list[str]) -> None:
    interrupted(engine, texts, 2000)


def in_threads(engine: paceline.Engine, texts: list[str], threads: int, generations: int) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(generations):
                number = dice.randrange(len(PROMPTS))
                text = use(engine, number, streamed=dice.random() < 0.5)
                if text != texts[number]:
                    wrong.append((number, text))
        except BaseException as error:
            wrong.append(error)

    started = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not wrong
    assert not engine.scheduler.busy


def test_threads_share_an_engine(engine: paceline.Engine, texts: list[str]) -> None:
    in_threads(engine, texts, 10, 5)


@pytest.mark.slow
def test_many_threads_share_an_engine(engine: paceline.Engine, texts: list[str]) -> None:
    in_threads(engine, texts, 40, 100)


def test_tasks_share_an_engine(engine: paceline.Engine, texts: list[str]) -> None:
    one = paceline.AsyncEngine(engine)

    async def streamed(number: int) -> str:
        events = [event async for event in one.stream(PROMPTS[number], sampling=sampling(number), **SETTINGS)]
        return "".join(event.text for event in events)

    async def whole(number: int) -> str:
        return (await one.generate(PROMPTS[number], sampling=sampling(number), **SETTINGS)).text

    async def in_a_thread(number: int) -> str:
        return await asyncio.to_thread(use, engine, number, streamed=True)

    async def cancelled(number: int) -> str:
        task = asyncio.create_task(streamed(number))
        await asyncio.sleep(0.002 * number)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return texts[number]

    async def all_at_once() -> list[str]:
        kinds = (streamed, whole, in_a_thread, cancelled)
        return await asyncio.gather(*(kind(number) for number in range(len(PROMPTS)) for kind in kinds))

    for _ in range(5):
        assert asyncio.run(all_at_once()) == [text for text in texts for _ in range(4)]
    assert engine.generate(PROMPTS[1], sampling=sampling(1), **SETTINGS).text == texts[1]
    assert not engine.scheduler.busy


def test_errors_of_coroutines_come_with_the_first_event(engine: paceline.Engine) -> None:
    one = paceline.AsyncEngine(engine)

    async def ask() -> None:
        async for _ in one.stream("", raw=True, max_tokens=0):
            raise AssertionError

    with pytest.raises(PacelineError):
        asyncio.run(ask())


def forked(engine: paceline.Engine, texts: list[str], count: int) -> None:
    def refused(number: int) -> None:
        with pytest.raises(BackendError, match="forked"):
            use(engine, number % len(PROMPTS), streamed=number % 2 == 0)

    stream = engine.stream(PROMPTS[2], sampling=sampling(2), **SETTINGS)
    heard = next(stream).text
    for number in range(count):
        in_child(lambda number=number: refused(number))
        assert use(engine, number % len(PROMPTS), streamed=False) == texts[number % len(PROMPTS)]
    assert heard + "".join(event.text for event in stream) == texts[2]


def test_a_forked_child_gets_one_error(engine: paceline.Engine, texts: list[str]) -> None:
    forked(engine, texts, 5)


@pytest.mark.slow
def test_fifty_forks(engine: paceline.Engine, texts: list[str]) -> None:
    forked(engine, texts, 50)


def test_a_forked_child_loads_its_own_and_ends(engine: paceline.Engine, texts: list[str]) -> None:
    program = (
        "import gc, os, sys, paceline\n"
        "engine = paceline.load('tiny-python', threads=2)\n"
        "greedy = paceline.SamplingParams()\n"
        "text = engine.generate('x =', raw=True, sampling=greedy, max_tokens=8).text\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    own = paceline.load('tiny-python', threads=2)\n"
        "    same = own.generate('x =', raw=True, sampling=greedy, max_tokens=8).text == text\n"
        "    del engine; gc.collect()\n"
        "    sys.exit(0 if same else 6)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert_quiet(program)


@pytest.mark.parametrize("streamed", [False, True])
def test_exit_while_threads_generate_is_quiet(streamed: bool) -> None:
    program = (
        "import threading, time, paceline\n"
        "engine = paceline.load('tiny-python', threads=2, slots=2)\n"
        "started = threading.Event()\n"
        "def work():\n"
        "    while True:\n"
        "        for _ in "
        + ("engine.stream" if streamed else "[engine.generate")
        + "('x =', raw=True, max_tokens=200)"
        + ("" if streamed else "]")
        + ": started.set()\n"
        "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
        "started.wait()\n"
        "time.sleep(0.05)\n"
    )
    assert_quiet(program)

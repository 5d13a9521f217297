"""A server in the test's own process, over a real model or over a backend that follows a script."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import uvicorn

from paceline.decode.draft_length import Costs
from paceline.engine.engine import Engine
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.scheduler import Scheduler
from paceline.server.app import ServerSettings, Service, create_app
from paceline.text import ChatTemplate, Tokenizer
from paceline.types import Float32, Result, SamplingParams, Work
from tests.parity.fixtures import VOCABULARY, tiny_tokenizer
from tests.scripted_backend import ScriptedBackend
from tests.support import proposers_of

BOS, EOS, TURN_END = "<bos>", "<eos>", "<turn|>"
COSTS = Costs((1.0, 1.1, 1.2, 1.3, 1.4))
TEMPLATE = """{{ bos_token }}
{%- if tools or enable_thinking %}<|turn>system
{%- if enable_thinking %}<|think|>{% endif %}
{%- for tool in tools or [] %}<|tool>declaration:{{ tool.function.name }}{{ tool.function.parameters | tojson }}<tool|>
{%- endfor %}<turn|>{% endif %}
{%- for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}
{%- raw %}{{% endraw %}
{%- for key, value in call.function.arguments.items() %}{{ key }}:{{ value }}{% endfor %}}<tool_call|>{% endfor %}
{%- if message.role == 'tool' %}<|tool_response>response:{{ message.name }}<tool_response|>{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


class WritingBackend(ScriptedBackend):
    """Writes a script after the last opening of the model's turn, then ends the turn; without one, noise."""

    def __init__(self, tokenizer: Tokenizer, script: str | None, **settings: object) -> None:
        super().__init__(VOCABULARY, **{"context": 2048, "max_rows": 64, **settings})
        self._opening = tokenizer.encode("<|turn>model\n")
        self._end = tokenizer.token_id(TURN_END)
        self.script = script
        self._tokenizer = tokenizer
        self.seconds = 0.0  # a pass takes

    def run(self, works: Sequence[Work]) -> list[Result]:
        time.sleep(self.seconds)
        return super().run(works)

    def _logits(self, tokens: list[int]) -> Float32:
        if self.script is None:
            return super()._logits(tokens)
        size = len(self._opening)
        places = [i for i in range(len(tokens) - size + 1) if tokens[i : i + size] == self._opening]
        written = len(tokens) - (places[-1] + size if places else 0)
        line = [*self._tokenizer.encode(self.script), self._end]
        logits = np.zeros(VOCABULARY, np.float32)
        logits[line[min(written, len(line) - 1)]] = 60
        return logits


def scripted_engine(script: str | None, **settings: object) -> Engine:
    """An engine that answers with a script; see `WritingBackend`."""
    raw = tiny_tokenizer()
    tokenizer = Tokenizer(raw, raw.token_to_id(BOS))
    waiting = settings.pop("most_waiting", 64)
    backend = WritingBackend(tokenizer, script, **settings)
    return Engine(
        backend=backend,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(TEMPLATE, {"bos_token": BOS}),
        target_config=SimpleNamespace(),
        drafter_config=None,
        stop_ids=frozenset({tokenizer.token_id(EOS), tokenizer.token_id(TURN_END)}),
        sampling=SamplingParams(),
        draft_tokens="auto",
        scheduler=Scheduler(backend, proposers_of(backend, COSTS), 16, waiting, PrefixCache(backend, 1 << 20)),
    )


@contextmanager
def serving(engine: Engine, **settings: object) -> Iterator[SimpleNamespace]:
    """A server on a free port of the loopback interface: its `url`, `service`, and `stop()` as SIGTERM does it."""
    app = create_app(engine, ServerSettings(**{"names": ("test-model",), **settings}))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop() -> None:
        server.should_exit = True

    service: Service = app.state.service
    try:
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{listening.getsockname()[1]}", service=service, stop=stop, thread=thread
        )
    finally:
        stop()
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def wait_until(true: object, seconds: float = 10.0) -> None:
    """Poll, at most that long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)

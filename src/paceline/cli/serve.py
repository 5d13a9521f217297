"""`paceline serve`: a model behind an OpenAI-compatible API, for one to a few users."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import options as opt
from paceline.errors import BackendError, SettingsError

if TYPE_CHECKING:
    from paceline.server.listening import Server

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
KEYS_VARIABLE = "PACELINE_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def serve(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP, metavar="MODEL")] = opt.DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Require this API key; may be given more than once (space-separated in the variable).",
            envvar=KEYS_VARIABLE,
        ),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        typer.Option(help="Model name in the API; may be given more than once.", metavar="NAME", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option(help="Maximum concurrent sequences; the rest are queued.", min=1, max=64)] = 4,
    queue: Annotated[int, typer.Option(help="Maximum queued sequences; further requests get status 429.", min=0)] = 64,
    context: opt.ContextOption = None,
    cache_memory: Annotated[
        str, typer.Option(help="Memory of the prefix cache; 0 disables it.", metavar="BYTES")
    ] = "1G",
    drafter: opt.DrafterOption = "auto",
    draft_tokens: opt.DraftTokensOption = "auto",
    device: opt.DeviceOption = "cpu",
    quant: opt.QuantOption = "auto",
    kv: opt.KvOption = "auto",
    threads: opt.ThreadsOption = None,
    timeout: Annotated[float, typer.Option(help="Time limit of a request in seconds.", min=1)] = 3600,
    grace: Annotated[
        float, typer.Option(help="Seconds for running requests to finish after Ctrl-C or SIGTERM.", min=0, max=86400)
    ] = 30,
    max_body: Annotated[str, typer.Option(help="Maximum size of a request body.", metavar="BYTES")] = "4M",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log the contents of requests.")] = False,
) -> None:
    """Serve a model with an OpenAI-compatible API and a playground.

    Chat, completions, responses, tools, structured output, streaming, all with
    speculative decoding. Ctrl-C stops when running and queued requests are
    finished, at most --grace seconds later, a second Ctrl-C at once.

    \b
    Examples:
      paceline serve                            (tiny-python; open http://127.0.0.1:8000)
      paceline serve google/gemma-4-E2B-it --quant q4
      paceline serve ./gemma-4-E4B-it --host 0.0.0.0 --api-key secret
    """
    max_bytes, memory = bytes_of("--max-body", max_body), bytes_of("--cache-memory", cache_memory)
    if any(not key.strip() for key in api_key or ()) or not os.environ.get(KEYS_VARIABLE, "x").strip():
        raise SettingsError(f"--api-key or {KEYS_VARIABLE} is empty; give a key, or omit it")
    try:
        from paceline.server.app import ServerSettings, create_app
        from paceline.server.listening import Server
        from paceline.server.memory import limit_arenas
    except ImportError as error:
        raise SettingsError(f"the server needs {error.name}; pip install 'paceline[server]'") from error
    limit_arenas()  # before there are threads
    listening = _listen(host, port)  # before loading, so that a port in use is reported at once
    engine = opt.load(
        model,
        drafter=drafter,
        device=device,
        quant=quant,
        kv=kv,
        threads=threads,
        context=context,
        slots=slots,
        draft_tokens=draft_tokens,
        cache_memory=memory,
        most_waiting=queue,
    )
    settings = ServerSettings(
        names=tuple(served_name or dict.fromkeys((model, Path(model).name))),
        keys=tuple(key.strip() for key in api_key or ()),
        hosts=(*LOOPBACK_NAMES, host) if _is_loopback(host) else (),
        max_bytes=max_bytes,
        max_seconds=timeout,
        log_prompts=log_prompts,
    )
    if not settings.hosts and not settings.keys:
        opt.note(f"anyone who can reach {host} can use the model; set --api-key to restrict access")
    _run(Server(create_app(engine, settings), grace), listening)


def bytes_of(option: str, text: str) -> int:
    """Parse a size such as 512M or 1.5G.

    Raises:
        SettingsError: not a size.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise SettingsError(f"{option} is {text!r}; give a size such as 512M or 2G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise BackendError(f"cannot listen on {host} port {port} ({error.strerror}); choose another --port") from error
    return listening


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _run(server: Server, listening: socket.socket) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    opt.note(f"listening at http://{name}:{port}/ (API at http://{name}:{port}/v1); Ctrl-C stops")
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at the end, which is no failure
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])

"""From an exported folder to a running server."""

import contextlib
import importlib.util
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from ..export import is_exported
from .limits import ServeLimits

API_KEY = "TOKENFLEX_API_KEY"
"""Environment variable: the key that requests must bring. Not an option: command lines can be read by everyone."""


def serve(
    folder: str | os.PathLike,
    limits: ServeLimits,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    hosts: Sequence[str] = (),
    has_page: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serve an exported model until a signal ends it; port 0 takes a free one. `hosts` are those that images and videos may be
    fetched from; with `has_page`, `/` is a page to try it on.

    Raises:
        UserError: no exported model, an address that cannot be had, or packages that are missing; before any weight is read.
    """
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"tokenflex serve needs {package}, which is not installed: pip install 'tokenflex[serve]'")
    import uvicorn
    from starlette.responses import Response  # noqa: F401  says now, not at the first request, that it is broken

    from ..infer import Generator
    from .app import LOOPBACK, Endpoint
    from .worker import Worker

    if not is_exported(folder):
        raise UserError(f"{folder}: no exported model there (no config.json); give the folder that training wrote")
    listener = _bound(host, port)
    with listener:
        generator = Generator(folder, cache_bytes=limits.max_cache_bytes)
        name = name or Path(folder).resolve().name
        about = _about(generator, limits)
        worker = Worker(generator, limits)
        key = os.environ.get(API_KEY, "")
        endpoint = Endpoint(worker, name, limits, about=about, hosts=hosts, key=key, has_page=has_page)
        app = endpoint.app(is_local=host in LOOPBACK)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        say(f"try {name} at {address}/" if has_page else f"serving {name} at {address}/v1")
        try:
            with contextlib.suppress(KeyboardInterrupt):  # raised again once everything is closed
                uvicorn.Server(settings).run(sockets=[listener])
        finally:
            worker.close()


def _about(generator, limits):
    """What the endpoint tells of a model."""
    config, processor = generator.model.config, generator.processor
    return {
        "trained_num_visual_tokens": list(config.trained_num_visual_tokens),
        "default_num_visual_tokens": config.default_num_visual_tokens,
        "default_total_visual_tokens": processor.total_visual_tokens or None,
        "default_effort": config.router["effort"] if config.router else None,
        "videos": {
            "are_read": importlib.util.find_spec("av") is not None,
            "frames_per_second": processor.frames_per_second,
            "max_frames": processor.max_frames,
        },
        "limits": asdict(limits),
    }


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # whoever is told of it may connect at once
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {why}; give another, or --port 0 for a free one") from None
    return listener

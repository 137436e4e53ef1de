"""`kveraser serve`: the server with OpenAI's and Anthropic's API, and its page."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kveraser.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    EraserOption,
    ModelOption,
    find_eraser,
    load,
    reported,
    stderr,
)
from kveraser.errors import OptionError
from kveraser.serving.exposure import check_exposure, check_keys

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(text: str) -> int:
    """A size such as `512M` or `4G`, in bytes.

    Raises:
        OptionError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if not found or not float(found[1]):
        raise OptionError(f"{text!r} is no size; write 512M or 4G")
    return int(float(found[1]) * _UNITS[found[2]])


def api_keys(given: Sequence[str], environment: str) -> list[str]:
    """The keys that are let in: of `--api-key`, and of `KVERASER_API_KEYS`, which may not be set.

    Raises:
        OptionError: an empty key, or one that no client could send.
    """
    keys = [*given, *(map(str.strip, environment.split(",")) if environment.strip() else ())]
    check_keys(keys)
    return keys


def local_names(host: str, keys: Sequence[str]) -> tuple[str, ...]:
    """The names by which browsers may call a server on an address: without keys this machine's, with keys (none named) all."""
    return () if keys else ("localhost", "127.0.0.1", "[::1]", host)


def listen(app: Any, host: str, port: int) -> None:
    """Serve an application until it is stopped, without a log of requests."""
    import uvicorn

    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 30}
    uvicorn.run(app, host=host.strip("[]"), port=port, **settings)


def serve_command(
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    eraser: EraserOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    policy: Annotated[str, typer.Option(help="exact, kveraser or auto, for requests that name none.")] = "exact",
    placeholder: Annotated[str, typer.Option(help="What clients put for cleared text; '' for nothing.")] = "[cleared]",
    cache_budget: Annotated[str, typer.Option(help="Memory for keys and values, such as 512M or 4G.")] = "4G",
    state_dir: Annotated[
        Path | None, typer.Option(help="Keep sessions here; default: they end with the server.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Let this key in; repeatable. Better: KVERASER_API_KEYS=key1,key2, which `ps` does not show."
        ),
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="The model's name in requests; default: --model.")] = None,
    queue_size: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered with 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request, waiting included.")] = 300.0,
    body_limit: Annotated[str, typer.Option(help="Longest request.")] = "8M",
) -> None:
    """Serve a model with OpenAI's and Anthropic's API, reusing what is cached also after clients drop or clear messages.

    Example: kveraser serve --policy auto --state-dir state
    """
    with reported():
        try:
            from kveraser.serving.app import AppOptions, create_app
            from kveraser.serving.service import Service, ServiceOptions
        except ImportError as error:
            raise OptionError(f"{error.name} is missing; install it with: pip install 'kveraser[serve]'") from error
        if policy not in ("exact", "kveraser", "auto"):
            raise OptionError(f"policy={policy!r} must be exact, kveraser or auto")
        keys = api_keys(api_key or (), os.environ.get("KVERASER_API_KEYS", ""))
        check_exposure(host, bool(keys), "set KVERASER_API_KEYS")
        options = ServiceOptions(
            policy=policy,  # type: ignore[arg-type]
            cache_budget=parse_bytes(cache_budget), placeholder=placeholder, state_dir=state_dir,
            queue_size=queue_size, timeout=timeout,
        )  # fmt: skip
        limit = parse_bytes(body_limit)
        backbone, tokenizer = load(model, device, dtype)
        service = Service(backbone, tokenizer, find_eraser(eraser, backbone), options)
        name = served_name or model
        app = create_app(service, AppOptions(name, keys, limit, hosts=local_names(host, keys)))
        at = f"http://{host}:{port}"
        stderr.print(f"serving {name!r} at {at}/v1 (policy {policy}), the page at {at}/; Ctrl-C stops", highlight=False)
        listen(app, host, port)

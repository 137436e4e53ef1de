"""`kveraser serve`: the server with OpenAI's and Anthropic's API, and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kveraser.cli import options as opt
from kveraser.cli.common import find_eraser, load, needing, reported, stderr
from kveraser.cli.listening import checked_keys, listen, local_names, parse_bytes, parse_readers


def serve_command(
    model: opt.Model = opt.DEFAULT_MODEL,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    eraser: opt.Eraser = None,
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 8000,
    policy: opt.Policy = "exact",
    readers: opt.Readers = opt.DEFAULT_READERS,
    max_residual: Annotated[
        float | None, typer.Option(help="Under auto: recompute at once where edits leave more behind, such as 0.1.")
    ] = None,
    cache_budget: Annotated[str, typer.Option(help="Memory for keys and values, such as 512M or 4G.")] = "4G",
    state_dir: Annotated[
        Path | None, typer.Option(help="Keep sessions here; default: they end with the server.")
    ] = None,
    api_key: opt.ApiKey = None,
    served_name: Annotated[str | None, typer.Option(help="The model's name in requests; default: --model.")] = None,
    queue_size: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered with 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request, waiting included.")] = 300.0,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Replies made at the same time; 1 makes them one after the other, with the very bits."
        ),
    ] = 16,
    body_limit: opt.BodyLimit = "8M",
) -> None:
    """Serve a model with OpenAI's and Anthropic's API, reusing what is cached also after clients drop or clear messages.

    Example: kveraser serve --policy auto --state-dir state
    """
    with reported():
        with needing("serve"):
            from kveraser.serving.app import AppOptions, create_app
            from kveraser.serving.service import Service, ServiceOptions
        keys = checked_keys(host, policy, api_key)
        options = ServiceOptions(
            policy=policy,  # type: ignore[arg-type]
            readers=parse_readers(readers),
            max_residual=max_residual,
            cache_budget=parse_bytes(cache_budget), state_dir=state_dir,
            queue_size=queue_size, timeout=timeout, batch=batch,
        )  # fmt: skip
        limit = parse_bytes(body_limit)
        backbone, tokenizer = load(model, device, dtype)
        service = Service(backbone, tokenizer, find_eraser(eraser, backbone), options)
        name = served_name or model
        app = create_app(service, AppOptions(name, keys, limit, hosts=local_names(host, keys)))
        at = f"http://{host}:{port}"
        stderr.print(f"serving {name!r} at {at}/v1 (policy {policy}), the page at {at}/; Ctrl-C stops", highlight=False)
        listen(app, host, port, stop_soon=service.stop_soon, grace=options.grace)

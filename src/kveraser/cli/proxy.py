"""`kveraser proxy`: the edit-aware front of vLLM servers."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kveraser.cli import options as opt
from kveraser.cli.common import needing, reported, stderr
from kveraser.cli.listening import checked_keys, listen, local_names, parse_bytes, parse_readers
from kveraser.errors import EngineError


def proxy_command(
    upstream: Annotated[
        list[str], typer.Option(help="Address of a vLLM server with kveraser's connector; repeatable.")
    ],
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 8000,
    policy: opt.Policy = "kveraser",
    readers: opt.Readers = opt.DEFAULT_READERS,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: where the servers say that the model is.")
    ] = None,
    min_saved: Annotated[int, typer.Option(min=0, help="Tokens that an edit has to save to be made.")] = 256,
    conversations: Annotated[int, typer.Option(min=1, help="Conversations that are remembered.")] = 1024,
    tokens: Annotated[str, typer.Option(help="Token ids of them that are remembered, such as 8M.")] = "8M",
    api_key: opt.ApiKey = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte after which a server failed.")
    ] = 600.0,
    body_limit: opt.BodyLimit = "32M",
) -> None:
    """Pass requests on to vLLM servers, and erase there what clients drop from their conversations.

    The servers' own API key, if they have one: KVERASER_UPSTREAM_KEY.

    Example: kveraser proxy --upstream http://127.0.0.1:8001 --upstream http://127.0.0.1:8002 --policy auto
    """
    with reported():
        with needing("serve"):
            from kveraser.engines.vllm.proxy.app import ProxyAppOptions, create_proxy
            from kveraser.engines.vllm.proxy.front import Front, ProxyOptions
        keys = checked_keys(host, policy, api_key)
        options = ProxyOptions(
            policy=policy,  # type: ignore[arg-type]
            readers=parse_readers(readers),
            upstream_key=os.environ.get("KVERASER_UPSTREAM_KEY", "").strip() or None,
            conversations=conversations, tokens=parse_bytes(tokens), min_saved=min_saved, timeout=timeout,
        )  # fmt: skip
        limit = parse_bytes(body_limit)
        loaded = None
        if tokenizer is not None:
            from transformers import AutoTokenizer

            try:
                loaded = AutoTokenizer.from_pretrained(tokenizer)
            except (OSError, ValueError) as error:
                raise EngineError(f"no tokenizer can be loaded from {tokenizer!r}") from error
        front = Front(upstream, options, loaded)
        app = create_proxy(front, ProxyAppOptions(keys, limit, hosts=local_names(host, keys)))
        stderr.print(
            f"passing on from http://{host}:{port}/v1 to {len(upstream)} server(s) (policy {policy}); Ctrl-C stops",
            highlight=False,
        )
        listen(app, host, port)

"""An agent clears an old tool result, as agent frameworks do to save context: what has to be processed again?

Knows: the `openai` client, two conversations. Does not know about kveraser: it only prints the object `kveraser` that
every reply has. The same conversation is sent twice, once under the policy `exact` and once under `kveraser`.

    kveraser serve &
    python examples/agent_clears_tool_results.py
"""

from __future__ import annotations

import argparse
from typing import Any

from openai import OpenAI

PAGE = "Room {n} was cleaned on day {n}; the window is closed, the lamp works, and nothing was left behind. "
ASK = {"role": "user", "content": "What is the access code? Answer with the code alone."}


def conversation(name: str, pages: int) -> list[dict[str, str]]:
    """A conversation of an agent whose first tool result has become stale."""
    talk = [
        {"role": "system", "content": f"You are an assistant of the {name} hotel. Answer briefly."},
        {"role": "user", "content": "What is the access code of the garage?"},
        {"role": "tool", "content": "Garage: the access code is 4711. " + PAGE.format(n=0) * 5},
        {"role": "assistant", "content": "I have looked it up. What else do you need?"},
    ]
    for number in range(1, pages + 1):
        talk.append({"role": "user", "content": f"Read page {number} of the report."})
        talk.append({"role": "tool", "content": PAGE.format(n=number) * 8})
        talk.append({"role": "assistant", "content": f"Page {number} says that all is well."})
    return talk


def main() -> None:
    """Run the conversation under both policies and print what each of them cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--pages", type=int, default=6, help="length of the conversation behind the stale result")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    model = client.models.list().data[0].id
    print(f"{'policy':10} {'prompt':>7} {'reused':>7} {'processed again':>16} {'seconds':>8}  exact  reply")
    for policy in ("exact", "kveraser"):
        extra: dict[str, Any] = {"kveraser": {"policy": policy}}
        talk: list[Any] = conversation(policy, options.pages)  # another hotel: nothing is shared between the two
        client.chat.completions.create(
            model=model, messages=[*talk, ASK], max_tokens=8, temperature=0, extra_body=extra
        )
        del talk[2]  # the tool result is dropped, as `clear_tool_uses` and the like do
        reply = client.chat.completions.create(
            model=model, messages=[*talk, ASK], max_tokens=8, temperature=0, extra_body=extra
        )
        found: dict[str, Any] = reply.model_extra["kveraser"] if reply.model_extra else {}
        prompt = reply.usage.prompt_tokens if reply.usage else 0
        text = reply.choices[0].message.content
        print(
            f"{policy:10} {prompt:7} {found['tokens_reused']:7} {found['tokens_recomputed']:16} "
            f"{found['seconds']:8.2f}  {found['exact']!s:5}  {text!r}"
        )


if __name__ == "__main__":
    main()

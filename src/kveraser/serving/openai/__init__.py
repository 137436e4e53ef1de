"""OpenAI's API: models, chat completions, completions.

Knows: OpenAI's JSON. Does not know how a prompt gets into a context.

    protocol: the bodies of requests -> requests: from a body to a prompt -> routes -> replies: from a reply to JSON, whole or streamed
"""

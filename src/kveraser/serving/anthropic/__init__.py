"""Anthropic's Messages API.

Knows: Anthropic's JSON. Does not know how a conversation gets into a context, nor about OpenAI's API.

    blocks, protocol    the bodies of requests         conversion       from a body to the conversation that all APIs have in common
    context_edits       what the server clears         requests         from a body to a prompt
    replies             from a reply to JSON           routes
"""

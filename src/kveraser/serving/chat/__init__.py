"""Conversations with tools, whichever API they come by: rendered by the model's template, their replies read back.

Knows: messages, tools, chat templates, what a reply holds. Does not know about HTTP or any API's JSON.

    messages    a conversation                      tools       what may be called, and whether a call's arguments are right
    template    what the model's template can do    dialects/   how models write calls: one file each
    rendering   from a conversation to a prompt     reading     from a reply's text to what it holds, piece by piece
    clearing    parts of a conversation, erased     answering   a prompt and its reply, through the service
    schemas     how large a schema is, references followed
"""

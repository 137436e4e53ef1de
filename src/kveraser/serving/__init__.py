"""A server with OpenAI's and Anthropic's API that understands edits. Needs the extra `serve`.

Knows: HTTP, conversations, sessions, on top of live contexts. Does not know how an erase is done.

    app         the application: routes, health                    access, errors, events, guarding, gauges, metrics, page, web/: its parts
    openai/, anthropic/   the endpoints of their APIs              sessions/: the endpoints of explicit erase sessions
    chat/       conversations with tools, as both APIs have them   error_forms: how errors are written; options: the field `kveraser`
    service     the model and its contexts; answers a prompt       completion: prompts and replies; decoding: logits to text
    contexts/   the contexts that are held: matching, reuse, budget, disk
    worker      the one thread that runs all of it, in turns       waiting: from a request to that thread and back
    together    the next tokens of all replies, in one forward     stopping: changes of sessions in the middle of a pass
    beside       tokenising, beside that thread                     exposure: who can reach the server; invalid: bad bodies explained
"""

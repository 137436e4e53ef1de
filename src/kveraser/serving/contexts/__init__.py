"""The contexts that the server holds, and what a request can use of them.

Knows: live contexts, matches of token ids, memory, disk. Does not know about HTTP, queues or decoding.

A context is either a cached *conversation* (of the endpoints of OpenAI and Anthropic: only a cache) or a *session* (never dropped).

    finding      which context saves a request the most        blocks, matching: what has changed; reuse: using what has not
    held         one context in memory                         view: its ids as a client would send them
    store        all of them, within the memory budget         state_dir: those on disk; cards, state_lock, state_v1: its files
    limits       how long a context may be                     idle_repair: exact again, in idle time
    forgetting   a text out of all of them
"""

"""Erasing inside vLLM. Each folder runs in other processes than the next:

    protocol.py   what the two sides say to each other, in a request's `kv_transfer_params` (needs neither side)
    client/       in the user's process: sessions over HTTP, and which forwards an erase takes. Needs no vLLM.
    proxy/        in a process of its own, before one or several servers: erases what unchanged clients drop. Needs no vLLM.
    server/       in vLLM's own processes (the connector, its store, the layout of a worker's cache), and what starts these.
    demo.py       both, on one machine

Imports nothing by itself, so that the client works where vLLM is not installed.

Knows: vLLM. Does not know about llama.cpp, or about a cache in the user's own process.
"""

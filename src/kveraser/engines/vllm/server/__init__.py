"""What runs in vLLM's processes: the connector (scheduler and workers), a worker's cache layout, the store of states.

Knows: vLLM's interfaces, files. Does not know about text, sessions or why states are exchanged. `launch.py` starts vLLM and
does not import it; `store.py` needs no vLLM either.
"""

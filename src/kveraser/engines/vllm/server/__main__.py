"""`python -m kveraser.engines.vllm.server`: start vLLM with the eraser and the connector.

Knows: where to start. Does not know about vLLM's arguments (`launch.py` does).
"""

from kveraser.engines.vllm.server.launch import main

main()

"""`python -m kveraser.engines.vllm.server`: start vLLM with the eraser and the connector."""

from kveraser.engines.vllm.server.launch import main

main()

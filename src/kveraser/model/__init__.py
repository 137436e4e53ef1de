"""A language model as transformers has it, seen from outside: loading it, telling it apart, running it in other ways.

Knows: transformers' models, configurations and attention interface, rotary positions, GGUF files. Does not know about
caches, spans or erasing.
"""

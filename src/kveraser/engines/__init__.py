"""Erasing inside inference engines that people already run. One folder or file per engine; nothing else imports them.

Each needs an engine that is installed apart (an extra of the package), and says so when it is missing.

Knows: one engine per folder. Does not know about a server or a terminal, nor one engine about another.
"""

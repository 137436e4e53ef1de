"""`python -m kveraser`, which is what launchers such as `accelerate launch -m` need.

Knows: the command line. Does not know its commands.
"""

from kveraser.cli import app

app()

"""`python -m kveraser`, which is what launchers such as `accelerate launch -m` need."""

from kveraser.cli import app

app()

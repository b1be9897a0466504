"""Modules:

- `kat.envs.images`: A box like bubblewrap's, in a container of podman's or Docker's: the same calls, the same limits, the same ends"""

__version__ = "0.1.0"

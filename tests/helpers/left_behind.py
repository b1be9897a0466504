"What episodes may leave behind: processes, open descriptors"
import os
from pathlib import Path


def offspring() -> set[int]:
    "Living processes below this one."
    below, parents = {os.getpid()}, {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            pid, rest = stat.read_text().split(' ', 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(pid)] = int(rest.rpartition(')')[2].split()[1])
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {os.getpid()}


def descriptors() -> list[str]:
    "What this process has open."
    links = [f'/proc/self/fd/{name}' for name in os.listdir('/proc/self/fd')]
    return sorted(os.readlink(link) for link in links if os.path.lexists(link))

"settings.ini, pyproject.toml, constraints.txt, the Makefile and what is installed say the same"
import re
import sysconfig
import tomllib
from configparser import ConfigParser
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kat

ROOT = Path(__file__).parents[2]
INI = ConfigParser(delimiters=['='])
INI.read(ROOT/'settings.ini')
INI = INI['DEFAULT']
TOML = tomllib.loads((ROOT/'pyproject.toml').read_text())
EXTRAS = {k.removeprefix('extra_'): v.split() for k, v in INI.items() if k.startswith('extra_')}
EXTRAS['dev'] = INI['dev_requirements'].split()
PINS = dict(line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if line[0] != '#')
PINS = {canonicalize_name(k): v for k, v in PINS.items()}


def test_pyproject_agrees():
    for k in ('lib_path', 'nbs_path', 'doc_path', 'tst_flags'):
        assert TOML['tool']['nbdev'][k] == INI[k], k
    assert TOML['project']['name'] == INI['lib_name'] == 'kat-rl'
    assert TOML['project']['requires-python'] == f">={INI['min_python']}"
    assert kat.__name__ == INI['lib_path']
    assert kat.__version__ == INI['version']


def test_bare_install_is_small():
    names = [Requirement(r).name for r in INI['requirements'].split()]
    assert names == 'numpy torch transformers safetensors pyarrow typer rich'.split()


def test_extras_of_the_installed_distribution():
    "What pip sees: name, version, extras (`all` is their union without vllm) and both kinds of entry point"
    dist, = Distribution.discover(name=INI['lib_name'], path=[sysconfig.get_path('purelib')])   # no stale egg-info
    assert dist.version == INI['version']
    seen = {x: set() for x in dist.metadata.get_all('Provides-Extra')}
    for r in map(Requirement, dist.requires):
        if r.marker is None or r.marker.evaluate({'extra': ''}): continue
        for x in seen:
            if r.marker.evaluate({'extra': x}):
                seen[x].add(r.name)
    want = {x: {Requirement(r).name for r in reqs} for x, reqs in EXTRAS.items()}
    assert {k: v for k, v in seen.items() if k != 'all'} == want
    assert seen['all'] == set().union(*(v for k, v in want.items() if k != 'vllm'))
    points = {(e.group, e.name): e.value for e in dist.entry_points}
    assert points['console_scripts', 'kat'] == 'kat.cli:main'
    assert points['nbdev', 'kat'] == 'kat._modidx:d'


def test_pins_cover_what_make_installs():
    "Every requirement that `make install` asks for is pinned, at a version that settings.ini allows"
    extras = re.search(r'^EXTRAS *= *(.*)$', (ROOT/'Makefile').read_text(), re.M)[1].split(',')
    for r in map(Requirement, INI['requirements'].split() + [r for x in extras for r in EXTRAS[x]]):
        assert canonicalize_name(r.name) in PINS, f'{r.name} is not in constraints.txt'
        assert r.specifier.contains(PINS[canonicalize_name(r.name)]), r
    assert all(re.fullmatch(r'[\w.!]+', v) for v in PINS.values()), 'a local version or path in constraints.txt'

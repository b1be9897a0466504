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
EXTRAS = {key.removeprefix('extra_'): value.split() for key, value in INI.items() if key.startswith('extra_')}
EXTRAS['dev'] = INI['dev_requirements'].split()
PINS = dict(line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if line[0] != '#')
PINS = {canonicalize_name(name): version for name, version in PINS.items()}


def test_pyproject_agrees():
    for key in ('lib_path', 'nbs_path', 'doc_path', 'tst_flags'):
        assert TOML['tool']['nbdev'][key] == INI[key], key
    assert TOML['project']['name'] == INI['lib_name'] == 'kat-rl'
    assert TOML['project']['requires-python'] == f">={INI['min_python']}"
    assert kat.__name__ == INI['lib_path']
    assert kat.__version__ == INI['version']


def test_bare_install_is_small():
    names = [Requirement(line).name for line in INI['requirements'].split()]
    assert names == 'numpy torch transformers safetensors pyarrow typer rich'.split()


def test_extras_of_the_installed_distribution():
    "What pip sees: name, version, extras (`all` is their union without vllm) and both kinds of entry point"
    dist, = Distribution.discover(name=INI['lib_name'], path=[sysconfig.get_path('purelib')])   # no stale egg-info
    assert dist.version == INI['version']
    seen = {extra: set() for extra in dist.metadata.get_all('Provides-Extra')}
    for required in map(Requirement, dist.requires):
        if required.marker is None or required.marker.evaluate({'extra': ''}): continue
        for extra in seen:
            if required.marker.evaluate({'extra': extra}):
                seen[extra].add(required.name)
    want = {extra: {Requirement(line).name for line in lines} for extra, lines in EXTRAS.items()}
    assert {extra: names for extra, names in seen.items() if extra != 'all'} == want
    assert seen['all'] == set().union(*(names for extra, names in want.items() if extra != 'vllm'))
    points = {(point.group, point.name): point.value for point in dist.entry_points}
    assert points['console_scripts', 'kat'] == 'kat.cli:main'
    assert points['nbdev', 'kat'] == 'kat._modidx:d'


def test_pins_cover_what_make_installs():
    "Every requirement that `make install` asks for is pinned, at a version that settings.ini allows"
    extras = re.search(r'^EXTRAS *= *(.*)$', (ROOT/'Makefile').read_text(), re.M)[1].split(',')
    asked = INI['requirements'].split() + [line for extra in extras for line in EXTRAS[extra]]
    for required in map(Requirement, asked):
        assert canonicalize_name(required.name) in PINS, f'{required.name} is not in constraints.txt'
        assert required.specifier.contains(PINS[canonicalize_name(required.name)]), required
    plain = all(re.fullmatch(r'[\w.!]+', version) for version in PINS.values())
    assert plain, 'a local version or path in constraints.txt'

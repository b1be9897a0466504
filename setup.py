"Packaging; every value lives in settings.ini"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = ini['DEFAULT']
extras = {name.removeprefix('extra_'): value.split() for name, value in cfg.items() if name.startswith('extra_')}
extras['dev'] = cfg['dev_requirements'].split()
extras['all'] = sorted({one for name, required in extras.items() if name != 'vllm' for one in required})
setup(
    version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(), license=cfg['license'],
    author=cfg['author'], author_email=cfg['author_email'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={'kat.plane': ['live.html'], 'kat.core': ['templates/*.jinja']},
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'nbdev': [f"{cfg['lib_path']} = {cfg['lib_path']}._modidx:d"],
                  'console_scripts': ['kat = kat.cli:main']},
)

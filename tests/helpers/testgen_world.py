"Small tasks whose tests are weak in known places, with packages of their own: pytest and no plugin"
import atexit
import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path

from kat.tasks.software import SoftwareTask, tree_patch, write_task


def file_tree(source, path='code_kat.py'):
    return {path: (source.encode(), 'file')}


@functools.cache
def small_site():
    "A folder that holds pytest and what it needs"
    home = Path(tempfile.mkdtemp(prefix='kat-site-'))
    atexit.register(shutil.rmtree, home)
    for name in ('pytest', '_pytest', 'pluggy', 'iniconfig', 'packaging', 'pygments'):
        source = Path(importlib.util.find_spec(name).origin).parent
        shutil.copytree(source, home/'small'/name, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(importlib.util.find_spec('py').origin, home/'small')
    return home


def make_task(folder, base, gold, tests, fail_to_pass, pass_to_pass=(), name='code-1', path='code_kat.py'):
    "A task of one module, `code_kat`, written below a folder"
    folder.mkdir(exist_ok=True)
    if not (folder/'sites').exists():
        (folder/'sites').symlink_to(small_site())
    ids = [tuple(f'test_code.py::{n}' for n in names) for names in (fail_to_pass, pass_to_pass)]
    limits = dict(memory_mb=2048, processes=64, files_mb=64)
    task = SoftwareTask(name, 'code', 'make it right', *ids, site='small', limits=limits)
    tree = file_tree(tests, 'test_code.py')
    before, after = file_tree(base, path), file_tree(gold, path)
    return write_task(task, folder, before, tree, tree_patch(before, after))

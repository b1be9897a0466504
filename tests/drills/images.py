"""The boxes' suite in a container, and two tasks graded in images of their own: `make images TASKS=folder`.

It needs root and Debian's packages: podman, runc and debootstrap, which it installs. Where that can't be, it says so.
"""
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = 'docker.io/library/kat-base:bookworm'


def skip(why):
    print(f'skipped: {why}')
    sys.exit(0)


def tools():
    "Install what is missing"
    if os.geteuid() != 0:
        skip('podman is set up as root')
    missing = [name for name in ('podman', 'runc', 'debootstrap') if not shutil.which(name)]
    if not missing: return
    if not shutil.which('apt-get'):
        skip(f'{", ".join(missing)} missing, and no apt-get')
    if subprocess.run(['apt-get', 'install', '-y', '-q', '--no-install-recommends', *missing]).returncode:
        skip(f'apt-get could not install {", ".join(missing)}')


def base_image(engine, work):
    "Debian with Python, made once"
    from kat.envs.images import has_image, import_image
    if has_image(engine, BASE): return
    print('debootstrap: Debian with Python (a minute, 400 MB)', flush=True)
    made = ['debootstrap', '--variant=minbase', '--include=python3', 'bookworm', f'{work}/base']
    if subprocess.run(made, stdout=subprocess.DEVNULL).returncode:
        skip("debootstrap failed: Debian's archive isn't reachable?")
    import_image(engine, f'{work}/base', BASE)


async def grade(folder, engine):
    "Nothing and gold, in an image built for the task"
    from kat.envs.images import Images, build_image, recipe
    from kat.envs.node import find_node
    from kat.tasks.software import base_tree, gold_tree, grade_state, read_task, site_folder
    task = read_task(folder)
    node = '' if task.language == 'python' else find_node()
    name = f'docker.io/library/kat-{task.site or task.language}:1'.lower()
    text, context = recipe(BASE, site_folder(folder), node)
    began = time.monotonic()
    await asyncio.to_thread(build_image, engine, text, context, name)
    built, box = time.monotonic() - began, Images(name, engine, node='/usr/local/bin/node')
    for state, tree in (('nothing', base_tree(folder)), ('gold', gold_tree(folder))):
        began = time.monotonic()
        said = await grade_state(folder, tree, box)
        print(f'{task.id}: built in {built:.0f} s; {state}: {"resolved" if said.passed else "not resolved"} '
              f'{said.tampered or said.failed} in {time.monotonic() - began:.0f} s', flush=True)
        assert said.passed == (state == 'gold'), said


def main(tasks):
    tools()
    with tempfile.TemporaryDirectory(prefix='kat-') as work:
        address = f'{work}/podman.sock'
        service = subprocess.Popen(['podman', '--runtime', 'runc', 'system', 'service', '-t', '0', f'unix://{address}'])
        try:
            until = time.monotonic() + 60
            while not os.path.exists(address):
                if time.monotonic() > until or service.poll() is not None:
                    skip('podman does not serve its API here')
                time.sleep(.1)
            os.environ.update(DOCKER_HOST=f'unix://{address}', KAT_IMAGE=BASE)
            from kat.envs.images import find_engine
            base_image(find_engine(), work)
            suite = str(ROOT/'tests/envs/test_boxes.py')
            subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rs', suite], check=True)
            if not tasks:
                skip('no folder of tasks was given (TASKS=…): none is graded in an image')
            from kat.tasks.software import read_tasks
            for folder in list(read_tasks(tasks).values())[:2]:
                asyncio.run(grade(folder, find_engine()))
        finally:
            service.terminate()
            service.wait(30)


if __name__ == '__main__':
    main(sys.argv[1] if sys.argv[1:] else '')

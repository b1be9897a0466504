"What Git itself writes is read, and a diff that was cut off is refused or is a shorter diff, never another one"
import random
import subprocess

import pytest

from kat.tasks.diffs import diff_files

NAMES = ['a.py', 'a b.py', 'é "q".py', 'new\tline.md', 'b/c.py', 'b/y b/y.py', 'x']
FLAGS = [('--no-renames',), ('-M',), ('-C', '--find-copies-harder', '--full-index')]
HEADERS = ('diff --git ', 'index ', 'old mode ', 'new file mode ', 'deleted file mode ', 'similarity ', 'rename from ',
           'copy from ', '--- ', '+++ ', 'GIT binary patch', 'literal ', 'delta ')


def git(folder, *args):
    settings = ['-c', 'user.name=a', '-c', 'user.email=a@example.org', '-c', 'core.autocrlf=false']
    return subprocess.run(['git', *settings, *args], cwd=folder, check=True, capture_output=True).stdout


def draw_file(rng):
    kind = rng.randrange(5)
    if kind == 0: return b''
    if kind == 1: return b'\0' + rng.randbytes(200)
    return ''.join(f'line {rng.randrange(9)}\n' for _ in range(rng.randrange(1, 30))).encode()


def draw_change(rng, folder):
    "Files that come, go, move, are copied, change their mode, and are touched in one line"
    for path in [p for p in sorted(folder.rglob('*')) if p.is_file() and '.git' not in p.parts]:
        kind, to = rng.randrange(7), folder/'moved'/f'{path.name}{rng.randrange(9)}'
        to.parent.mkdir(exist_ok=True)
        if kind == 0:
            path.unlink()
        elif kind in (1, 2):
            to.write_bytes(path.read_bytes() + b'one line more\n' * (rng.random() < .5))
            path.unlink()
        elif kind == 3:
            path.chmod(0o755)
        elif kind == 4:
            to.write_bytes(path.read_bytes())
            path.write_bytes(path.read_bytes() + b'more')
        elif kind == 5:
            path.write_bytes(draw_file(rng))
            path.chmod(rng.choice([0o644, 0o755]))
    (folder/f'new {rng.randrange(9)}').write_bytes(draw_file(rng))


@pytest.fixture(params=range(8))
def diffs(request, tmp_path):
    "(what Git writes, the paths it tells) of one change, for all flags"
    rng = random.Random(request.param)
    for name in NAMES:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(draw_file(rng))
    git(tmp_path, 'init', '-q')
    git(tmp_path, 'add', '-A')
    git(tmp_path, 'commit', '-qm', 'one')
    draw_change(rng, tmp_path)
    git(tmp_path, 'add', '-A')
    found = []
    for flags in FLAGS:
        ask = lambda *more: git(tmp_path, 'diff', '--cached', *flags, *more, 'HEAD').decode()
        numbers = [row.split('\t', 2) for row in ask('--numstat', '-z').split('\0') if row]
        names = [x for x in ask('--name-only', '-z').split('\0') if x]
        sizes = [(0, 0) if x[0] == '-' else (int(x[0]), int(x[1])) for x in numbers if len(x) == 3]
        found += [(ask('-p', *shown), list(zip(names, sizes, strict=True))) for shown in ((), ('--binary',))]
    return found


def test_git_and_we_tell_the_same(diffs):
    for text, told in diffs:
        assert [(x['path'], (x['added'], x['removed'])) for x in diff_files(text)] == told
        assert ''.join(x['text'] for x in diff_files(text)) == text


def test_a_cut_diff_is_never_another_one(diffs):
    "At every line; only another mode looks whole in a header, as it may be all that changed"
    for text, told in diffs:
        lines = [f'{line}\n' for line in text.split('\n')[:-1]]
        for n in range(1, len(lines)):
            try:
                found = diff_files(''.join(lines[:n]))
            except ValueError:
                continue
            assert [x['path'] for x in found] == [path for path, _ in told[:len(found)]]
            assert not lines[n - 1].startswith(HEADERS) or lines[n - 1].startswith('index ') and (
                lines[n].startswith('diff --git ')), lines[n - 1]


@pytest.mark.parametrize('text', [
    'diff --git a/x b/yy\nsimilarity index 100%\n', 'diff --git a/x b/yy\nsimilarity index 100%\nrename from x\n',
    'diff --git a/x b/yy\nsimilarity index 90%\nrename from x\nrename to yy\n', 'diff --git a/x b/x\nold mode 100644\n',
    'diff --git a/x b/x\nindex 1234567..7654321 100644\n', 'diff --git a/x b/x\nnew file mode 100644\n',
    'diff --git a/x b/x\nnew file mode 100644\nindex 0000000..7654321\n',
    'diff --git a/x b/yy\nold mode 1\nnew mode 2\n',
    'diff --git a/x b/x\nindex 1234567..7654321 100644\nGIT binary patch\nliteral 3\nKcmZ=\n\n'])
def test_a_header_that_was_cut_off_is_seen(text):
    with pytest.raises(ValueError, match='cut off'):
        diff_files(text)

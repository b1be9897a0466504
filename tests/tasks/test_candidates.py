"The funnel: filters, the statement without the fix, what the leak report sees, rows that go on"
import difflib
import json
import random
import subprocess
import tracemalloc
from dataclasses import asdict

import pytest
from github_world import START, Jumping, Server, World, serving, stamp
from hypothesis import given
from hypothesis import strategies as st

from kat.core.io import UserError
from kat.tasks.candidates import collect_into, funnel_into, read_tokens, run_funnel
from kat.tasks.filters import FUNNEL_STAGES, Filters, english_share, read_filters, sift
from kat.tasks.funnel import Funnel, draw_funnel, funnel_table, restart, stage_counts
from kat.tasks.cases import Case
from kat.tasks.diffs import diff_files
from kat.tasks.harvest import Harvest
from kat.tasks.instances import clean_text, hint_texts, is_source_path, is_test_path, mined, split_patch
from kat.tasks.leaks import common_run, leak_report

GOLD = '''diff --git a/knots/core.py b/knots/core.py
--- a/knots/core.py
+++ b/knots/core.py
@@ -1,3 +1,4 @@
 def tie(rope):
-    return rope
+    knot_size = len(rope) + 1
+    return rope + 'o' * knot_size
     # tied
'''
TESTS = '''diff --git a/tests/test_core.py b/tests/test_core.py
--- a/tests/test_core.py
+++ b/tests/test_core.py
@@ -1 +1,2 @@
 from knots.core import tie
+def test_tie_twice(): assert tie('a') == 'aoo'
'''
BODY = 'When the rope is empty, `tie` raises an error. It should return the rope that it was given, as the docs say.'
LINK = 'ann/knots#7'


def case(**changes):
    "A pull request that goes through all stages, with changes: `pull_title=…` changes the pull request's title."
    day = lambda n: stamp(START + n * 86400)
    issue = dict(number=7, title='tie fails', body=BODY, state='closed', created_at=day(1), author='ann', labels=[],
                 is_pull=False, comments=0, edited_at=None)
    pull = dict(number=12, title='Mend tie', body='Fixes #7', state='merged', merged_at=day(3), created_at=day(2),
                author='bob', branch='main', base='b' * 40, head='c' * 40, merge_commit='e' * 40, labels=[], comments=0,
                reviews=1, changed_files=2, closes=[LINK], mentions=[LINK])
    about = dict(stars=100, licence='MIT', fork=False, archived=False, language='Python', branch='main',
                 created_at=day(0), pushed_at=day(3))
    made = Case('ann/knots', 12, about, pull, day(3), [LINK], {LINK: issue}, {LINK: []}, diff=GOLD + TESTS, merged=50,
                base=dict(commit='a' * 40, first_commit_at=day(2)))
    for name, value in changes.items():
        part, _, key = name.partition('_')
        whole = dict(pull=pull, issue=issue, about=about).get(part)
        if whole is None or not key:
            setattr(made, name, value)
        else:
            whole[key] = value
    if 'files' not in changes:
        made.files = [dict(path=x['path'], added=x['added'], removed=x['removed']) for x in diff_files(made.diff)]
    return made


def test_a_good_one_goes_through():
    assert sift(case(), Filters()) == ('leak', '')


binary = 'diff --git a/tests/x.png b/tests/x.png\nBinary files a/tests/x.png and b/tests/x.png differ\n'


@pytest.mark.parametrize('changes, stage, reason', [
    (dict(about_stars=19), 'repository', 'few stars: 19'),
    (dict(about_licence='GPL-3.0'), 'repository', 'licence: GPL'),
    (dict(about_licence=None), 'repository', 'licence: None'), (dict(merged=9), 'repository', 'few merged'),
    (dict(pull_state='closed'), 'merged', 'not merged: closed'), (dict(links=[]), 'issue', 'closes no issue'),
    (dict(links=[f'a/b#{i}' for i in range(4)]), 'issue', 'many issues: 4'),
    (dict(issue_is_pull=True), 'issue', 'closes a pull request'),
    (dict(issue_created_at=stamp(START + 9 * 86400)), 'issue', 'issue is younger'),
    (dict(issues={LINK: None}, gaps={('issue', LINK): 'HTTP 410 at x'}), 'issue', "issue can't be had: HTTP 410 at x"),
    (dict(issue_body='![a](https://x.org/a.png)\n<img src="x">'), 'text', 'only images'),
    (dict(issue_body='See https://x.org/a and <!-- words --> https://x.org/b'), 'text', 'short text'),
    (dict(issue_body='https://x.org/a https://x.org/b'), 'text', 'only addresses'),
    (dict(issue_body='broken'), 'text', 'short text: 17'), (dict(issue_body=BODY * 300), 'text', 'long text'),
    (dict(issue_body='Wenn das Seil leer ist, wirft die Funktion einen Fehler, statt es einfach zurück zu geben. ' * 2),
     'text', 'not English'),
    (dict(issue_edited_at=stamp(START + 9 * 86400)), 'text', 'issue changed after'),
    (dict(diff=GOLD), 'files', 'no test file'), (dict(diff=TESTS), 'files', 'no source file'),
    (dict(diff=TESTS + GOLD.replace('core.py', 'core.md')), 'files', 'no source file'),
    (dict(diff=TESTS + ''.join(GOLD.replace('core', f'c{i}') for i in range(16))), 'files', 'many files: 16'),
    (dict(diff=None, files=None), 'files', None),
    (dict(diff=None, files=None, gaps={('files', ''): 'HTTP 404 at x'}), 'files', "files can't be had: HTTP 404"),
    (dict(diff=GOLD + TESTS + binary), 'patch', 'binary file'),
    (dict(diff=GOLD + TESTS[:-40], files=[dict(path=x, added=1, removed=0) for x in ('a.py', 'test_a.py')]),
     'patch', 'damaged diff'),
    (dict(issue_body=f"{BODY} Write knot_size = len(rope) + 1 and then return rope + 'o' * knot_size"),
     'leak', 'tells')])
def test_filters(changes, stage, reason):
    filters = Filters(run=7) if stage == 'leak' else Filters()
    where, why = sift(case(**changes), filters)
    assert where == stage
    assert why is None if reason is None else why.startswith(reason), why


def test_what_is_not_known_yet_is_not_decided():
    for changes in (dict(about=None), dict(issues={LINK: None}), dict(files=None, diff=None)):
        assert sift(case(**changes), Filters())[1] is None
    assert sift(case(about=None), Filters(stars=0, licences='')) == ('leak', '')


@pytest.mark.parametrize('text, english', [
    ('The function should return the value that was given, but it raises when the list is empty.', True),
    ('Running this with numpy 2 does not work after the update.', True),
    ('```\nthe and this that with when should would have has not but are\n```\nFunktioniert leider nicht mehr', False),
    ('当列表为空时，函数会引发错误，而不是返回给定的值。', False),
    ('Функция вызывает ошибку, если список пуст.', False),
    ('La fonction lève une erreur quand la liste est vide, alors qu\'elle devrait la retourner.', False),
    ('La función lanza un error cuando la lista está vacía en lugar de devolverla.', False),
    ('De functie geeft een fout als de lijst leeg is, in plaats van deze terug te geven.', False),
    ('Die Funktion wirft einen Fehler, wenn die Liste leer ist, anstatt sie zurückzugeben.', False),
    ('Fungsi ini gagal ketika daftar kosong, seharusnya mengembalikan nilai yang diberikan.', False), ('', False)])
def test_the_rule_for_english(text, english):
    assert (english_share(text) >= Filters.english) == english


# patches

@pytest.mark.parametrize('path, test, source', [
    ('tests/a.py', True, False), ('src/test_a.py', True, False), ('a_test.go', True, False),
    ('conftest.py', True, False), ('src/latest.py', False, True), ('testing.py', False, True),
    ('contest/a.py', False, True), ('a.test.js', True, False),
    ('src/FooTest.java', True, False), ('src/Latest.java', False, True), ('README.md', False, False),
    ('Tests/x.json', True, False), ('lib/__tests__/a.ts', True, False), ('attest.py', False, True), ('', False, False)])
def test_which_files_are_tests(path, test, source):
    assert (is_test_path(path), is_source_path(path)) == (test, source)


def test_a_split_patch_loses_nothing():
    gold, tests = split_patch(TESTS + GOLD + binary)
    assert (gold, tests) == (GOLD, TESTS + binary)
    odd = GOLD.replace('"', '').replace('a/knots/core.py', '"a/kn\\303\\266ts/co\\"re.py"').replace(
        'b/knots/core.py', '"b/kn\\303\\266ts/co\\"re.py"')
    assert diff_files(odd)[0]['path'] == 'knöts/co"re.py'
    moved = 'diff --git a/a b.py b/tests/a b.py\nsimilarity index 100%\nrename from a b.py\nrename to tests/a b.py\n'
    empty = 'diff --git a/x y/z b/x y/z\nnew file mode 100644\nindex 0000000..e69de29\n'
    gone = GOLD.replace('+++ b/knots/core.py', '+++ /dev/null')
    assert [x['path'] for x in diff_files(moved + empty + gone)] == ['tests/a b.py', 'x y/z', 'knots/core.py']


def test_lines_that_look_like_headers_are_lines():
    inner = GOLD.replace('-    return rope', '--- a/evil.py')
    inner = inner.replace("+    return rope + 'o' * knot_size", '+++ b/evil.py')
    inner = inner.replace('     # tied', ' diff --git a/x b/x')
    one, = diff_files(inner)
    assert (one['path'], one['added'], one['removed']) == ('knots/core.py', 2, 1)


@given(st.integers(0, len(GOLD + TESTS) - 1))
def test_a_diff_that_was_cut_off_is_seen(at):
    "Cut between two files it is whole by itself; then the list of files tells"
    whole = GOLD + TESTS
    if whole[:at] == GOLD: return
    with pytest.raises(ValueError):
        diff_files(whole[:at])


def git(folder, *args):
    settings = ['-c', 'user.name=a', '-c', 'user.email=a@example.org', '-c', 'core.autocrlf=false']
    return subprocess.run(['git', *settings, *args], cwd=folder, check=True, capture_output=True).stdout


@pytest.mark.parametrize('seed', range(4))
def test_the_parts_of_a_real_diff_apply(tmp_path, seed):
    "What Git itself writes, with odd names and odd lines, and takes back: first one part, then the other"
    rng = random.Random(seed)
    odd = ['', 'x', '--- a/x', '+++ b/x', '@@ -1 +1 @@', 'diff --git a/x b/x', '\ttab', 'é', '\\ No', '\r']
    line = lambda: rng.choice(odd)
    names = ['src/a.py', 'src/a b.py', 'tests/é "q".py', 'tests/test_x.py', 'docs/new\tline.md', 'a/b/c.py']
    write = lambda: [(tmp_path/name).write_bytes('\n'.join(line() for _ in range(rng.randint(0, 9))).encode())
                     for name in rng.sample(names, 5)]
    for name in names:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
    git(tmp_path, 'init', '-q')
    write()
    git(tmp_path, 'add', '-A')
    git(tmp_path, 'commit', '-qm', 'one')
    write()
    (tmp_path/rng.choice(names)).unlink(missing_ok=True)
    git(tmp_path, 'add', '-A')
    tree = git(tmp_path, 'write-tree')
    diff = git(tmp_path, 'diff', '--cached', 'HEAD').decode()
    assert {x['path'] for x in diff_files(diff)} == {
        name.decode() for name in git(tmp_path, 'diff', '--cached', '--name-only', '-z', 'HEAD').split(b'\0') if name}
    gold, tests = split_patch(diff)
    git(tmp_path, 'reset', '-q', '--hard')
    for part in filter(None, (tests, gold)):
        (tmp_path/'.git'/'part').write_bytes(part.encode())
        git(tmp_path, 'apply', '--index', '.git/part')
    assert git(tmp_path, 'write-tree') == tree


# what the statement tells

def test_the_statement_loses_what_gives_the_fix_away():
    text = f'''Words stay.<!-- a template says: fixes #7 -->
See https://github.com/ann/knots/commit/abcdef1 and https://github.com/ann/knots/pull/12/files#r1.
But https://example.org/pulley stays.
It was mended in #12 ({'c' * 10}) or ann/knots#12, not in #123 or ann/ropes#12; merged as {'e' * 40}.
```diff
-    return rope
+    knot_size = len(rope) + 1
```
    return rope + 'o' * knot_size
return rope'''
    told, gone = clean_text(text, GOLD, case())
    assert 'template' not in told and 'commit' not in told and 'pull/12' not in told and 'pulley stays' in told
    assert 'in [removed] ([removed]) or [removed], not in #123 or ann/ropes#12;' in told and 'eee' not in told
    assert 'knot_size' not in told and told.count('return rope') == 2 and len(gone) == 8


@given(st.lists(st.sampled_from(['Words.', '    return rope', "    return rope + 'o' * knot_size", '', 'mended in #12',
                                 'cccccccccc', '`x`', '```', 'https://x.org/pull/3'])).map('\n'.join))
def test_cleaning_is_idempotent(text):
    once, _ = clean_text(text, GOLD, case())
    assert clean_text(once, GOLD, case()) == (once, []) and leak_report(once, GOLD)['lines'] == 0


def test_hints_end_where_the_work_begins():
    "By the comment's own time, whatever comes before it, and not what was changed later"
    say = lambda n, body, edited=None: dict(author='a', body=body, created_at=stamp(START + n), edited_at=edited)
    late = stamp(START + 9 * 86400)
    talk = [say(5, 'second'), say(900000, 'too late'), say(4, 'first'), say(6, 'changed', late), say(7, ' '),
            say(8, 'third')]
    assert hint_texts(case(talk={LINK: talk})) == ['first', 'second', 'third']


@given(st.lists(st.sampled_from('abc'), max_size=14), st.lists(st.sampled_from('abc'), max_size=14))
def test_the_longest_common_run_is_the_longest(left, right):
    inside = lambda run, whole: any(whole[i:i + len(run)] == run for i in range(len(whole) - len(run) + 1))
    run = common_run(left, right)
    assert inside(run, left) and inside(run, right)
    pairs = [(i, j) for i in range(len(left)) for j in range(i + 1, len(left) + 1)]
    assert len(run) == max((j - i for i, j in pairs if inside(left[i:j], right)), default=0)
    slow = difflib.SequenceMatcher(None, left, right, False).find_longest_match()
    assert run == left[slow.a:slow.a + slow.size]                             # and the first of them


def test_the_longest_common_run_of_long_texts_fits_into_memory():
    "A table of dashes beside a patch of dashes: all runs of one length together would be gigabytes"
    tracemalloc.start()
    try:
        assert len(common_run(['-'] * 10_000, ['-'] * 10_000 + ['x'])) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_leak_report():
    quiet = leak_report(BODY, GOLD, ['tests/test_core.py::test_tie_twice[a-1]', 'test_tie_twice (tests.Case)'])
    assert quiet == dict(longest_run=1, fresh_run=1, run='rope', names=[], tests=[], lines=0)
    loud = leak_report("test_tie_twice fails:\n  knot_size = len(rope) + 1\n", GOLD, ['a.py::T::test_tie_twice[x]'])
    assert loud['fresh_run'] == 8 and loud['names'] == ['knot_size'] and loud['tests'] == ['test_tie_twice']
    assert loud['lines'] == 1 and json.loads(json.dumps(loud)) == loud
    quoted = leak_report('def tie(rope):\n    return rope', GOLD)       # the old code is how one reports a bug
    assert quoted['longest_run'] == 8 and quoted['fresh_run'] <= 3 and quoted['lines'] == 0
    assert leak_report('', '', ()) == dict(longest_run=0, fresh_run=0, run='', names=[], tests=[], lines=0)


def fix(*lines):
    "A gold patch that brings these lines"
    return (f'diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1 +1,{len(lines)} @@\n-def tie(rope):\n'
            + ''.join(f'+{line}\n' for line in lines))


@pytest.mark.parametrize('told, names', [
    ('It should call `measure`.', ['measure']), ('Use measure(rope).', ['measure']), ('Set length=3.', ['length']),
    ('Ask rope.measure for it.', ['measure']), ('```\nmeasure the rope\n```', ['measure']),
    ('Please measure the length of it.', []),        # words
    ('`loose ends` and `sorted`, `fathom`', []),     # of a string, of Python, of a comment
    ('`after_all`', ['after_all'])])                 # a comment ends with its line
def test_names_of_the_fix_that_a_statement_says(told, names):
    gold = fix('length = measure(sorted(rope))  # in fathom', "after_all = 'loose ends'", 'return after_all, length')
    assert leak_report(told, gold)['names'] == names


@pytest.mark.parametrize('id, told, named', [
    ('a.py::test_knot[x::y]', 'see test_knot', ['test_knot']), ('pkg.Case.test_knot', 'see test_knot', ['test_knot']),
    ('test_knot (pkg.Case.test_knot)', 'test_knot', ['test_knot']), ('a.py::test_knot', 'test_knots', []),
    ('t/a.js::knots > ties a rope', 'It ties a\n  rope.', ['ties a rope']), ('t/a.js::parse() > limit', 'parse', []),
    ('t/a.js::keeps `[]` apart', 'Why keeps `[]` apart?', ['keeps `[]` apart']), ('t/a.js::-', 'a - b', [])])
def test_tests_that_a_statement_names(id, told, named):
    assert leak_report(told, fix('pass'), [id])['tests'] == named


def test_a_mined_task_has_swe_benchs_fields():
    said = dict(author='a', body='Me too', created_at=stamp(START), edited_at=None)
    one = asdict(mined(case(talk={LINK: [said]})))
    assert (one['instance_id'], one['base_commit']) == ('ann__knots-12', 'a' * 40)
    assert one['created_at'] == stamp(START + 2 * 86400)
    assert one['patch'] == GOLD and one['test_patch'] == TESTS and one['hints_text'] == 'Me too'
    assert one['problem_statement'] == f'tie fails\n\n{BODY}' and one['issues'] == [LINK]
    names = '''instance_id repo base_commit patch test_patch problem_statement hints_text created_at version
        environment_setup_commit FAIL_TO_PASS PASS_TO_PASS'''.split()
    assert list(one)[:12] == names
    assert mined(case(base=None)).base_commit == 'b' * 40


# parameters

@pytest.mark.parametrize('pair, said', [
    ('star=3', 'one of stars'), ('stars', 'key=value'), ('stars=many', 'of type int'), ('edited=yes', 'of type bool'),
    ('stars=-1', 'not below 0'), ('after=2024', 'a day such as'), ('stars=1.5', 'of type int')])
def test_parameters_that_are_none(pair, said):
    with pytest.raises(ValueError, match=said):
        read_filters([pair])


def test_parameters():
    assert read_filters(['stars=5', 'stars=6', 'edited=true', 'english=0', 'licences=']) == Filters(
        stars=6, edited=True, english=0., licences='')


def test_tokens(tmp_path, monkeypatch):
    (tmp_path/'t').write_text('abc  # mine\n\n# none\nabc\ndef\n')
    assert read_tokens(tmp_path/'t') == ['abc', 'def']
    (tmp_path/'t').write_text('abc\nsecret word\n')
    with pytest.raises(ValueError, match='t:2: not a token') as refused:
        read_tokens(tmp_path/'t')
    assert 'secret' not in str(refused.value)
    (tmp_path/'t').write_text('# nothing\n')
    with pytest.raises(ValueError, match='no token in it'):
        read_tokens(tmp_path/'t')
    for text, tokens in (('', [None]), (' \n', [None]), ('abc\n', ['abc'])):
        monkeypatch.setenv('GITHUB_TOKEN', text)
        assert read_tokens(None) == tokens


# the funnel

def test_rows_go_on_where_they_were(tmp_path):
    more = (*FUNNEL_STAGES, 'install', 'validate')
    funnel = Funnel(tmp_path/'f.db', more)
    for id, stage, reason in (('a-1', 'repository', 'few stars: 3'), ('a-2', 'leak', ''), ('a-4', 'validate', ''),
                              ('a-3', 'validate', 'flaky: 2'), ('a-5', 'files', 'no test file')):
        funnel.note(id, 'a', stage, reason, 1.5)
    funnel.note('a-3', 'a', 'validate', 'flaky: 3', 2)
    counts = {x['stage']: x for x in stage_counts(funnel.rows(), more)}
    assert [counts[s]['entered'] for s in more] == [5, 4, 4, 4, 4, 3, 3, 3, 2]
    assert [counts[s]['passed'] for s in more] == [4, 4, 4, 4, 3, 3, 3, 2, 1]
    assert counts['validate']['reasons'] == dict(flaky=1) and counts['validate']['seconds'] == 5
    funnel.close()
    funnel = Funnel(tmp_path/'f.db', FUNNEL_STAGES)                           # the file knows what comes after
    assert funnel.stages == more
    assert restart(funnel, 'validate') == 2
    assert [(r['stage'], r['reason']) for r in funnel.rows()[2:4]] == [('install', '')] * 2
    assert restart(funnel, 'repository') == 5 and funnel.rows() == []
    with pytest.raises(ValueError, match="stage 'x': one of"):
        funnel.note('a', 'a', 'x', '', 0)
    with pytest.raises(ValueError, match='made with the stages'):
        Funnel(tmp_path/'f.db', ('other',))
    (tmp_path/'g.db').write_text('no database at all, ' * 100)
    with pytest.raises(ValueError, match='not a funnel'):
        Funnel(tmp_path/'g.db', FUNNEL_STAGES)
    funnel.close()


@given(st.lists(st.tuples(st.sampled_from(list(FUNNEL_STAGES)), st.sampled_from(['', 'a: 1', 'b']))))
def test_the_funnel_loses_nobody(drawn):
    table = [dict(stage=stage, reason=reason, seconds=0) for stage, reason in drawn]
    counts = stage_counts(table, FUNNEL_STAGES)
    waiting = sum(stage != 'leak' and reason == '' for stage, reason in drawn)
    assert len(drawn) == sum(sum(x['reasons'].values()) for x in counts) + counts[-1]['passed'] + waiting
    for above, below in zip(counts, counts[1:]):
        assert above['passed'] == below['entered']
    assert len(funnel_table(table, FUNNEL_STAGES).splitlines()) == len(FUNNEL_STAGES) + 1


def collected(tmp_path, world, **filters):
    "A world collected and sifted as the commands do it."
    with serving(Server(world, largest=100)) as server:
        said = collect_into(tmp_path, ['ann/knots'], api=server.url, filters=Filters(**filters), tell=lambda line: None,
                            clock=Jumping())
    return server, said


def test_from_github_to_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv('GITHUB_TOKEN', 't1')
    world = World(30, pulls=40)
    for issue in world.repos['ann/knots']['issues'].values():
        issue['body'] = BODY if issue['number'] % 3 else 'short'
    server, said = collected(tmp_path, world)
    pulls, issues = (world.repos['ann/knots'][kind] for kind in ('pulls', 'issues'))
    want = {n for n, x in pulls.items() if x['merged_at'] and x['links'] and x['links'][0] % 3
            and x['created_at'] > issues[x['links'][0]]['created_at']}
    assert len(want) > 3
    asked = {what for what, _ in server.log if what.endswith('diff')}
    assert asked == {f'/repos/ann/knots/pulls/{n}? diff' for n in want}       # no diff is asked for in vain
    table = funnel_into(tmp_path, picture=tmp_path/'f.png')
    lines = [json.loads(line) for line in (tmp_path/'mined.jsonl').read_text().splitlines()]
    assert {x['number'] for x in lines} == want and table.splitlines()[-1].endswith(f'mined.jsonl: {len(want)}')
    for x in lines:
        whole = world.diff('ann/knots', x['number'])
        assert sorted((x['patch'] + x['test_patch']).split('\n')) == sorted(whole.split('\n'))
    assert (tmp_path/'f.png').stat().st_size > 5000 and said[0].endswith('repo 1') and 'requests' in said[1]
    before = (tmp_path/'mined.jsonl').read_bytes()
    assert funnel_into(tmp_path).splitlines()[1:] == table.splitlines()[1:]
    assert (tmp_path/'mined.jsonl').read_bytes() == before


def test_only_what_is_new_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setenv('GITHUB_TOKEN', 't1')
    world = World(31, pulls=30)
    for issue in world.repos['ann/knots']['issues'].values():
        issue['body'] = BODY
    collected(tmp_path, world)
    harvest, funnel = Harvest(tmp_path/'collect.db'), Funnel(tmp_path/'funnel.db', (*FUNNEL_STAGES, 'validate'))
    seconds = lambda: {r['id']: r['seconds'] for r in funnel.rows()}
    through = run_funnel(harvest, funnel, tell=print)
    first, one = seconds(), through[0].instance_id
    funnel.note(one, 'ann/knots', 'validate', 'gold fails: 3', 60)
    assert [x.instance_id for x in run_funnel(harvest, funnel)] == [x.instance_id for x in through]
    assert seconds() == first | {one: first[one] + 60}                        # nothing was looked at
    run_funnel(harvest, funnel, Filters(files=14))                            # other parameters: everything
    assert all(now > first[id] for id, now in seconds().items())
    kept = next(r for r in funnel.rows() if r['id'] == one)
    assert (kept['stage'], kept['reason']) == ('validate', 'gold fails: 3')   # but the task is the same
    run_funnel(harvest, funnel, Filters(stars=10**6))
    assert {r['stage'] for r in funnel.rows()} == {'repository'}
    run_funnel(harvest, funnel)
    assert next(r for r in funnel.rows() if r['id'] == one)['stage'] == 'leak'
    before = seconds()
    run_funnel(harvest, funnel, start='files')
    again = {id for id, now in seconds().items() if now > before[id]}
    assert again == {r['id'] for r in funnel.rows() if r['stage'] in ('files', 'patch', 'leak')} and again
    with pytest.raises(ValueError, match="stage 'nowhere': one of"):
        run_funnel(harvest, funnel, start='nowhere')
    funnel.close()
    harvest.close()


@pytest.mark.parametrize('options, said', [
    (dict(names=['knots']), 'knots: OWNER/NAME expected'), (dict(names=[]), 'either repositories'),
    (dict(names=['a/b'], pages='x'), 'either repositories'), (dict(names=[], pages='x'), 'no such folder'),
    (dict(names=[], pages='.', token_file='t'), 'saved pages need none'),
    (dict(names=['a/b'], token_file='t'), 'no such'),
    (dict(names=['a/b'], api='github.com'), 'an address'), (dict(names=['a/b/c']), 'OWNER/NAME'),
    (dict(names=['../..']), 'OWNER/NAME'), (dict(names=['a/..']), 'OWNER/NAME')])
def test_mistakes(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        collect_into(tmp_path/'out', **options)
    assert not (tmp_path/'out').exists()
    with pytest.raises(UserError, match='nothing collected there'):
        funnel_into(tmp_path/'out')


def test_an_empty_funnel_is_drawn_too(tmp_path):
    figure = draw_funnel([], FUNNEL_STAGES)
    assert len(figure.axes[0].patches) == len(FUNNEL_STAGES) + 1
    import matplotlib.pyplot as plt
    plt.close(figure)

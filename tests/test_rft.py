"Discrepancy, reward and monitor of RFT: the properties that the design promises"
import itertools, json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kat.core.types import Trajectory
from kat.learn.rft import (Alignment, Episode, Monitor, discrepancy, group_advantages, normal_turn, parts, patch_facts,
                           reward, savings, shadow, shared, squeeze)

few = settings(max_examples=40, deadline=None)
FILES = {'a.py': 'def f(x):\n    y = x\n    return y\n', 'b.py': 'def g(x):\n    return x\n'}
calls = st.builds(lambda n, p, k: dict(name=n, arguments=dict(path=p, line=k), ok=True),
                  st.sampled_from(['view', 'edit', 'test']), st.sampled_from(['a.py', 'b.py']), st.integers(1, 2))
turns = st.lists(st.builds(lambda c, e: dict(calls=c, tokens=5, errors=e), st.lists(calls, max_size=3),
                           st.sampled_from([0, 0, 0, 1])), max_size=5)
lines = st.lists(st.sampled_from(['def g(x):', '    return x', '    return x + 1', '', '    y = x']), max_size=4)
patches = st.none() | st.dictionaries(st.sampled_from(['a.py', 'b.py', 'c.py']), lines.map('\n'.join), max_size=2) \
    | st.lists(st.tuples(st.sampled_from(['a.py', 'b.py']), st.integers(1, 3), st.sampled_from(['x', 'y = 1'])),
               max_size=3)


def info(turns, tests, patch=None, finish='submit'):
    return dict(turns=turns, tests=tests, patch=patch, files=FILES, finish=finish)


def infos(tests): return st.builds(info, turns, tests, patches)


passing = st.just({'t': True, 'u': True})
failing = st.sampled_from([{'t': True, 'u': False}, {'t': True}, {}, {'t': False}])
truths = st.lists(infos(passing).map(Episode.of), min_size=1, max_size=3)


# the promises of the design

@few
@given(truths)
def test_zero_for_a_ground_truth(gs):
    for g in gs: assert discrepancy(g, g) == 0 and reward(g, gs) == 1


@few
@given(infos(passing), infos(failing), truths)
def test_passing_beats_failing_whatever_the_path(good, bad, gs):
    good, bad = Episode.of(good), Episode.of(bad)
    for g in gs: assert 0 <= discrepancy(good, g) <= .1 and .2 <= discrepancy(bad, g) <= 1
    assert 0 <= reward(bad, gs) <= .8 < .9 <= reward(good, gs) <= 1


@few
@given(infos(passing | failing), truths)
def test_a_stopped_rollout_has_the_worst_outcome(o, gs):
    e = Episode.of(o | dict(finish='stopped'))
    assert parts(e, gs[0])['outcome'] == 1 and reward(e, gs) <= .4 + 1e-12


@few
@given(infos(passing | failing), truths, st.randoms(use_true_random=False))
def test_order_inside_a_turn_and_of_keys_does_not_matter(o, gs, rnd):
    other = json.loads(json.dumps(o))
    for t in other['turns']:
        rnd.shuffle(t['calls'])
        for c in t['calls']: c['arguments'] = dict(reversed(c['arguments'].items()))
    for g in gs: assert discrepancy(Episode.of(other), g) == discrepancy(Episode.of(o), g)


words = st.sampled_from(['return', 'x', 'y1', '12', 'not', '+', '==', '(', ')', "'", '.'])


@few
@given(st.lists(words, min_size=1, max_size=12), st.data())
def test_white_space_of_arguments_does_not_matter(tokens, data):
    def spaced():
        out = data.draw(st.sampled_from(['', ' ', '\n  ']))
        for a, b in zip(tokens, tokens[1:] + ['']):
            glue = [' ', '  ', '\n\t'] if a[-1].isalnum() and b[:1].isalnum() else ['', ' ', '  ', '\n']
            out += a + data.draw(st.sampled_from(glue))
        return out
    one, two = spaced(), spaced()
    assert squeeze(one) == squeeze(two) == squeeze(squeeze(one))
    edit = lambda s: dict(calls=[dict(name='edit', arguments=dict(path='a.py', text=s), ok=True)])
    assert normal_turn(edit(one)) == normal_turn(edit(two))


def test_a_malformed_call_is_no_call_and_a_failed_one_is():
    failed = dict(name='view', arguments={}, ok=False)
    assert normal_turn(dict(calls=[failed], errors=1)) == normal_turn(dict(calls=[failed | dict(ok=True)], errors=0))
    assert normal_turn(dict(calls=[failed], errors=3))['malformed', ()] == 2
    assert normal_turn(dict(calls=[], errors=0)) == Counter({('no call', ()): 1})


def test_white_space_between_words_does_matter():
    assert squeeze('not x') != squeeze('notx') and squeeze(3) == squeeze('3')


@few
@given(infos(passing), st.data())
def test_monotone_when_needed_calls_are_missing(o, data):
    g, before = Episode.of(o), 0.
    turns = [dict(t, calls=list(t['calls'])) for t in o['turns'] if not t['errors']]
    g = Episode.of(o | dict(turns=turns))
    while any(t['calls'] for t in turns):
        t = data.draw(st.sampled_from([t for t in turns if t['calls']]))
        t['calls'].pop(data.draw(st.integers(0, len(t['calls']) - 1)))
        now = discrepancy(Episode.of(o | dict(turns=turns)), g)
        assert now > before or now == pytest.approx(before)
        before = now


@few
@given(infos(failing), truths)
def test_more_passing_tests_and_more_ground_truths_never_hurt(o, gs):
    names = ['t', 'u', 'v', 'w']
    g = Episode(gs[0].turns, dict.fromkeys(names, True), gs[0].facts, False)
    d = [discrepancy(Episode.of(o | dict(tests={n: i < k for i, n in enumerate(names)})), g) for k in range(5)]
    assert d == sorted(d, reverse=True)
    e = Episode.of(o)
    assert reward(e, gs) == max(reward(e, [g]) for g in gs)


# the parts, against slow and plain versions

small = st.lists(st.sampled_from('ab').flatmap(lambda n: st.tuples(st.just(n), st.sampled_from('xyz'))), max_size=4)


@few
@given(small, small)
def test_shared_is_the_best_matching(a, b):
    a, b = sorted([a, b], key=len)
    worth = lambda p, q: 1. if p == q else .5 if p[0] == q[0] else 0.
    best = max(sum(map(worth, a, perm)) for perm in itertools.permutations(b, len(a)))
    assert shared(Counter(a), Counter(b)) == shared(Counter(b), Counter(a)) == best


@few
@given(st.lists(small.map(Counter), max_size=4), st.lists(small.map(Counter), max_size=4))
def test_alignment_is_the_best_monotone_one(o, g):
    al = Alignment(g)
    for t in o: al.add(t)
    for j in range(len(g) + 1):
        best = max(sum(shared(o[p], g[q]) for p, q in zip(ps, qs)) for k in range(min(len(o), j) + 1)
                   for ps in itertools.combinations(range(len(o)), k) for qs in itertools.combinations(range(j), k))
        assert al.best[j] == best
    assert 0 <= al.discrepancy(prefix=True) <= al.discrepancy() <= 1 or not al.size


def test_parallel_and_sequential_reading_differ_only_in_actions():
    c = [dict(name='view', arguments=dict(path=p), ok=True) for p in FILES]
    par, seq = ([dict(calls=c)], [dict(calls=[x]) for x in c])
    p = parts(Episode.of(info(seq, {'t': True}, {})), Episode.of(info(par, {'t': True}, {})))
    assert p == dict(outcome=0, actions=.5, patch=0)


def test_patch_ranks_failures():
    def d(patch): return parts(Episode.of(info([], {}, patch)), g)['patch']
    g = Episode.of(info([], {}, {'b.py': 'def g(x):\n    return x + 1\n'}))
    same, text, line = (d({path: new}) for path, new in (('./b.py', 'def g(x):\n    return x+1\n'),
                        ('b.py', 'def g(x):\n    return 7\n'), ('b.py', 'def g(y):\n    return x\n')))
    assert same == 0 < text < line < d({'a.py': FILES['a.py'] + 'z = 1\n'}) == d({}) == 1
    assert d({'b.py': FILES['b.py']}) == 1                       # written, not changed
    where, what = patch_facts([('b.py', 2, 'return  x + 1')])[1:]
    assert where == Counter({('b.py', 2): 1}) and what == Counter({('b.py', '+', 'return x+1'): 1})


def test_no_patch_on_one_side_leaves_the_part_out():
    assert 'patch' not in parts(Episode.of(info([], {}, {})), Episode.of(info([], {})))


# faults

def test_faults_are_named():
    with pytest.raises(ValueError, match="task 'k9'.*turns"): Episode.of(Trajectory('k9', []))
    o, bad = Episode.of(info([], {})), Episode.of(info([], {'t': False}))
    with pytest.raises(ValueError, match='at least one ground truth'): reward(o, [])
    with pytest.raises(ValueError, match='ground truth 0 does not pass'): reward(o, [bad])
    for kw in (dict(threshold=0.), dict(threshold=1.5), dict(patience=0)):
        with pytest.raises(ValueError, match='Monitor'): Monitor([o], **kw)
    with pytest.raises(ValueError, match='Monitor'): Monitor([])


def test_an_episode_survives_storage():
    t = Trajectory('t', [], 1., info=info([dict(calls=[], tokens=3, errors=0)], {'t': True}, [('a.py', 1, 'x')]))
    assert Episode.of(Trajectory.from_dict(json.loads(json.dumps(t.to_dict())))) == Episode.of(t)


# advantages

@few
@given(st.lists(st.floats(0, 1) | st.just(float('nan')), max_size=8), st.integers(1, 4), st.booleans())
def test_advantages(rewards, n_gt, std):
    a = group_advantages(rewards, n_gt, std)
    assert len(a) == len(rewards) + n_gt and np.isfinite(a).all() and abs(a.sum()) < 1e-6
    assert (a[:len(rewards)][np.isnan(rewards)] == 0).all() if rewards else True
    assert (a[len(rewards):] >= 0).all()                           # nothing in the group is better than a ground truth


def test_advantages_by_hand():
    assert group_advantages([0., .5], 2, std=False) == pytest.approx([-.625, -.125, .375, .375])
    x = np.array([0, .5, 1, 1])
    assert group_advantages([0., .5], 2) == pytest.approx((x - x.mean()) / x.std())
    assert not group_advantages([1., 1.], 1).any()


# the monitor

@few
@given(truths, st.data())
def test_a_prefix_of_a_ground_truth_is_never_stopped(gs, data):
    i = data.draw(infos(passing))
    m = Monitor([*gs, Episode.of(i)], threshold=.01, patience=1)
    assert [m.observe(t) for t in i['turns']] == ['go'] * len(i['turns']) and not any(m.running)


@few
@given(infos(failing), truths)
def test_running_discrepancy_is_that_of_the_prefix(o, gs):
    m = Monitor(gs)
    for k, t in enumerate(o['turns'], 1):
        m.observe(t)
        prefix = Episode.of(info(o['turns'][:k], {}, finish='stopped'))
        assert m.running[-1] == pytest.approx(min(parts(prefix, g)['actions'] for g in gs))
    assert (m.turns, m.tokens) == (len(o['turns']), 5 * len(o['turns']))


def one(name): return dict(calls=[dict(name=name, arguments={}, ok=True)], tokens=7, errors=0)
def lost(n): return [one('list')] * n
def good(): return [one('view'), one('edit'), one('test')]


def test_patience_and_recovery():
    m = Monitor([Episode.of(info(good(), {'t': True}))], threshold=.55, patience=2)
    assert [m.observe(t) for t in lost(1) + good()[:1] + lost(4)] == ['go', 'go', 'go', 'go', 'stop', 'stop']


def test_wrong_edits_count_when_the_driver_passes_them():
    g = [Episode.of(info(good(), {'t': True}, {'b.py': 'def g(x):\n    return x + 1\n'}))]
    m = Monitor(g, threshold=.5, patience=1)
    assert m.observe(good()[0], {}, FILES) == 'go' and m.running == [0]
    assert m.observe(good()[1], {'a.py': 'pass\n'}, FILES) == 'stop'


def test_savings_exact_and_estimated():
    g = [Episode.of(info(good(), {'t': True}))]
    runs = [info(good(), {'t': True}), info(lost(6), {'t': False}), info(lost(5), {'t': True})]
    r = shadow(runs, [g] * 3, patience=2)
    assert (r['n'], r['stopped'], r['false_stops'], r['turns_saved'], r['tokens_saved']) == (3, 2, 1, 7, 49)
    assert r['turns_share'] == r['tokens_share'] == 7 / 14
    cut, broken = info(lost(1), {}, finish='stopped'), info([], {}, finish='infra')
    r = savings([info(good(), {}), info(lost(5), {}), cut, broken])
    assert r == dict(n=4, stopped=1, turns_saved=3, tokens_saved=21)
    assert savings([])['turns_saved'] == 0

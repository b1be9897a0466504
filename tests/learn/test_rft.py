"Discrepancy, reward and monitor of RFT: the properties that the design promises"
import asyncio
import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from kat.core.chat import ids_of, render
from kat.core.template import train_tokenizer
from kat.core.io import write_jsonl
from kat.core.types import Segment, Trajectory
from kat.envs.base import ToolCall
from kat.envs.expert import Expert
from kat.envs.micro import SYSTEM, MicroEnv
from kat.envs.micro_tasks import make_task
from kat.envs.sandbox import MeteredPool
from kat.infer.engines import HFEngine
from kat.infer.requests import Completion
from kat.learn.rft import (Alignment, Attempt, GroundTruth, Monitor, discrepancy, load_ground_truths, normal_turn,
                           parts, patch_facts, rft_advantages, rft_reward, save_ground_truths, savings, shadow,
                           shared, squeeze, with_logprobs)
from kat.learn.rl import make_row
from kat.learn.training import load_model
from kat.recipe.evaluation import finish_stopped
from kat.recipe.pipeline import ROOT
from kat.recipe.rollouts import ModelPolicy, ScriptPolicy, rollout
from kat.study.evaluate import wilson

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


def infos(tests):
    return st.builds(info, turns, tests, patches)


passing = st.just({'t': True, 'u': True})
failing = st.sampled_from([{'t': True, 'u': False}, {'t': True}, {}, {'t': False}])
truths = st.lists(infos(passing).map(Attempt.of), min_size=1, max_size=3)


# the promises of the design

@few
@given(truths)
def test_zero_for_a_ground_truth(gs):
    for g in gs:
        assert discrepancy(g, g) == 0 and rft_reward(g, gs) == 1


@few
@given(infos(passing), infos(failing), truths)
def test_passing_beats_failing_whatever_the_path(good, bad, gs):
    good, bad = Attempt.of(good), Attempt.of(bad)
    for g in gs:
        assert 0 <= discrepancy(good, g) <= .1 and .2 <= discrepancy(bad, g) <= 1
    assert 0 <= rft_reward(bad, gs) <= .8 < .9 <= rft_reward(good, gs) <= 1


@few
@given(infos(passing | failing), truths)
def test_a_stopped_rollout_has_the_worst_outcome(o, gs):
    e = Attempt.of(o | dict(finish='stopped'))
    assert parts(e, gs[0])['outcome'] == 1 and rft_reward(e, gs) <= .4 + 1e-12


@few
@given(infos(passing | failing), truths, st.randoms(use_true_random=False))
def test_order_inside_a_turn_and_of_keys_does_not_matter(o, gs, rnd):
    other = json.loads(json.dumps(o))
    for t in other['turns']:
        rnd.shuffle(t['calls'])
        for c in t['calls']:
            c['arguments'] = dict(reversed(c['arguments'].items()))
    for g in gs:
        assert discrepancy(Attempt.of(other), g) == discrepancy(Attempt.of(o), g)


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
    g, before = Attempt.of(o), 0.
    turns = [dict(t, calls=list(t['calls'])) for t in o['turns'] if not t['errors']]
    g = Attempt.of(o | dict(turns=turns))
    while any(t['calls'] for t in turns):
        t = data.draw(st.sampled_from([t for t in turns if t['calls']]))
        t['calls'].pop(data.draw(st.integers(0, len(t['calls']) - 1)))
        now = discrepancy(Attempt.of(o | dict(turns=turns)), g)
        assert now > before or now == pytest.approx(before)
        before = now


@few
@given(infos(failing), truths)
def test_more_passing_tests_and_more_ground_truths_never_hurt(o, gs):
    names = ['t', 'u', 'v', 'w']
    g = Attempt(gs[0].turns, dict.fromkeys(names, True), gs[0].facts, False)
    d = [discrepancy(Attempt.of(o | dict(tests={n: i < k for i, n in enumerate(names)})), g) for k in range(5)]
    assert d == sorted(d, reverse=True)
    e = Attempt.of(o)
    assert rft_reward(e, gs) == max(rft_reward(e, [g]) for g in gs)


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
    for t in o:
        al.add(t)
    for j in range(len(g) + 1):
        best = max(sum(shared(o[p], g[q]) for p, q in zip(ps, qs)) for k in range(min(len(o), j) + 1)
                   for ps in itertools.combinations(range(len(o)), k) for qs in itertools.combinations(range(j), k))
        assert al.best[j] == best
    assert 0 <= al.discrepancy(prefix=True) <= al.discrepancy() <= 1 or not al.size


def test_parallel_and_sequential_reading_differ_only_in_actions():
    c = [dict(name='view', arguments=dict(path=p), ok=True) for p in FILES]
    par, seq = ([dict(calls=c)], [dict(calls=[x]) for x in c])
    p = parts(Attempt.of(info(seq, {'t': True}, {})), Attempt.of(info(par, {'t': True}, {})))
    assert p == dict(outcome=0, actions=.5, patch=0)


def test_patch_ranks_failures():
    def d(patch):
        return parts(Attempt.of(info([], {}, patch)), g)['patch']
    g = Attempt.of(info([], {}, {'b.py': 'def g(x):\n    return x + 1\n'}))
    same, text, line = (d({path: new}) for path, new in (('./b.py', 'def g(x):\n    return x+1\n'),
                        ('b.py', 'def g(x):\n    return 7\n'), ('b.py', 'def g(y):\n    return x\n')))
    assert same == 0 < text < line < d({'a.py': FILES['a.py'] + 'z = 1\n'}) == d({}) == 1
    assert d({'b.py': FILES['b.py']}) == 1                       # written, not changed
    where, what = patch_facts([('b.py', 2, 'return  x + 1')])[1:]
    assert where == Counter({('b.py', 2): 1}) and what == Counter({('b.py', '+', 'return x+1'): 1})


def test_no_patch_on_one_side_leaves_the_part_out():
    assert 'patch' not in parts(Attempt.of(info([], {}, {})), Attempt.of(info([], {})))


# faults

def test_faults_are_named():
    with pytest.raises(ValueError, match="task 'k9'.*turns"):
        Attempt.of(Trajectory('k9', []))
    o, bad = Attempt.of(info([], {})), Attempt.of(info([], {'t': False}))
    with pytest.raises(ValueError, match='at least one ground truth'):
        rft_reward(o, [])
    with pytest.raises(ValueError, match='ground truth 0 does not pass'):
        rft_reward(o, [bad])
    for kw in (dict(threshold=0.), dict(threshold=1.5), dict(patience=0)):
        with pytest.raises(ValueError, match='Monitor'):
            Monitor([o], **kw)
    with pytest.raises(ValueError, match='Monitor'):
        Monitor([])


def test_an_episode_survives_storage():
    t = Trajectory('t', [], 1., info=info([dict(calls=[], tokens=3, errors=0)], {'t': True}, [('a.py', 1, 'x')]))
    assert Attempt.of(Trajectory.from_dict(json.loads(json.dumps(t.to_dict())))) == Attempt.of(t)


# advantages

@few
@given(st.lists(st.floats(0, 1) | st.just(float('nan')), max_size=8), st.integers(1, 4), st.booleans())
def test_advantages(rewards, n_gt, std):
    a = rft_advantages(rewards, n_gt, std)
    assert len(a) == len(rewards) + n_gt and np.isfinite(a).all() and abs(a.sum()) < 1e-5
    assert (a[:len(rewards)][np.isnan(rewards)] == 0).all() if rewards else True
    assert (a[len(rewards):] >= 0).all()                           # nothing in the group is better than a ground truth


def test_advantages_by_hand():
    assert rft_advantages([0., .5], 2, std=False) == pytest.approx([-.625, -.125, .375, .375])
    x = np.array([0, .5, 1, 1])
    assert rft_advantages([0., .5], 2) == pytest.approx((x - x.mean()) / x.std(ddof=1), rel=1e-5)
    assert not rft_advantages([1., 1.], 1).any()


# the monitor

@few
@given(truths, st.data())
def test_a_prefix_of_a_ground_truth_is_never_stopped(gs, data):
    i = data.draw(infos(passing))
    m = Monitor([*gs, Attempt.of(i)], threshold=.01, patience=1)
    assert [m.observe(t) for t in i['turns']] == ['go'] * len(i['turns']) and not any(m.running)


@few
@given(infos(failing), truths)
def test_running_discrepancy_is_that_of_the_prefix(o, gs):
    m = Monitor(gs)
    for k, t in enumerate(o['turns'], 1):
        m.observe(t)
        prefix = Attempt.of(info(o['turns'][:k], {}, finish='stopped'))
        assert m.running[-1] == pytest.approx(min(parts(prefix, g)['actions'] for g in gs))
    assert (m.turns, m.tokens) == (len(o['turns']), 5 * len(o['turns']))


def one(name):
    return dict(calls=[dict(name=name, arguments={}, ok=True)], tokens=7, errors=0)
def lost(n):
    return [one('list')] * n
def good():
    return [one('view'), one('edit'), one('test')]


def test_patience_and_recovery():
    m = Monitor([Attempt.of(info(good(), {'t': True}))], threshold=.55, patience=2)
    assert [m.observe(t) for t in lost(1) + good()[:1] + lost(4)] == ['go', 'go', 'go', 'go', 'stop', 'stop']


def test_wrong_edits_count_when_the_driver_passes_them():
    g = [Attempt.of(info(good(), {'t': True}, {'b.py': 'def g(x):\n    return x + 1\n'}))]
    m = Monitor(g, threshold=.5, patience=1)
    assert m.observe(good()[0], {}, FILES) == 'go' and m.running == [0]
    assert m.observe(good()[1], {'a.py': 'pass\n'}, FILES) == 'stop'


def test_savings_exact_and_estimated():
    g = [Attempt.of(info(good(), {'t': True}))]
    runs = [info(good(), {'t': True}), info(lost(6), {'t': False}), info(lost(5), {'t': True})]
    r = shadow(runs, [g] * 3, patience=2)
    assert (r['n'], r['stopped'], r['false_stops'], r['turns_saved'], r['tokens_saved']) == (3, 2, 1, 7, 49)
    assert r['turns_share'] == r['tokens_share'] == 7 / 14
    cut, broken = info(lost(1), {}, finish='stopped'), info([], {}, finish='infra')
    r = savings([info(good(), {}), info(lost(5), {}), cut, broken])
    assert r == dict(n=4, stopped=1, corrected=0, sampled_tokens=63, turns_saved=3, tokens_saved=21)
    assert savings([info([*lost(1), good()[0] | dict(corrected=True)], {})])['corrected'] == 1
    assert savings([])['turns_saved'] == 0


# reformatting, weights, prefixes, harm: the rest of the promises

def spread(line, draw):
    "The same line, formatted another way: more or less white space around punctuation, and after the end."
    indent, body = line[:len(line) - len(line.lstrip())], line.strip()
    glue = draw(st.sampled_from([' ', '  ', '\t']))
    return indent + ''.join(glue + c + glue if c in '+=' else c for c in body) + draw(st.sampled_from(['', ' ', '\t ']))


@few
@given(infos(passing | failing), truths, st.data())
def test_reformatted_files_are_the_same_patch(o, gs, data):
    if isinstance(o['patch'], dict):
        blank = lambda: data.draw(st.sampled_from(['', '\n', ' \n']))
        line = lambda s: blank() + (spread(s, data.draw) if s.strip() else s) + '\n'
        new = {f'./{path}': ''.join(map(line, text.splitlines())) + blank() for path, text in o['patch'].items()}
        for g in gs:
            assert discrepancy(Attempt.of(o | dict(patch=new)), g) == discrepancy(Attempt.of(o), g)


def test_indentation_is_no_formatting_and_a_reformatted_line_is_not_touched():
    files, right = {'a.py': 'for x in y:\n    f(x)\n    g(x)\n'}, 'for x in y:\n    f(x)\ng(x)\n'
    assert patch_facts({'a.py': 'for x in y :\n\n    f( x )\n    g(x) \n'}, files) == (Counter(), Counter(), Counter())
    assert patch_facts({'a.py': right}, files)[1] == Counter({('a.py', 3): 1})
    assert patch_facts({'a.py': files['a.py'] + '\n\nh()\n'}, files)[1] == Counter({('a.py', 4): 1})
    assert patch_facts({'new.py': 'h()\n'}, files)[1] == Counter({('new.py', 1): 1})


weights = st.fixed_dictionaries(dict(outcome=st.floats(0, 5), patch=st.floats(0, 5), actions=st.floats(0, 5)))


@few
@given(infos(passing), infos(failing), truths, weights)
def test_the_outcome_dominates_under_any_weights(good, bad, gs, w):
    good, bad = Attempt.of(good), Attempt.of(bad)
    assert all(discrepancy(good, g, w) <= .1 + 1e-12 and discrepancy(bad, g, w) >= .2 - 1e-12 for g in gs)
    assert rft_reward(good, gs, w) > rft_reward(bad, gs, w)
    assert all(discrepancy(g, g, w) == 0 for g in gs)


@few
@given(infos(passing), truths, st.lists(st.booleans(), min_size=4, max_size=4).filter(any), st.data())
def test_each_test_broken_raises_the_discrepancy(o, gs, passed, data):
    tests = dict(zip('tuvw', passed))
    broken = tests | {data.draw(st.sampled_from([k for k, ok in tests.items() if ok])): False}
    before, after = (Attempt.of(o | dict(tests=t)) for t in (tests, broken))
    for g in gs:
        assert discrepancy(after, g) > discrepancy(before, g)
    assert rft_reward(after, gs) < rft_reward(before, gs)


def worth(o, g):
    al = Alignment(g.turns)
    for t in o.turns:
        al.add(t)
    return al.best[-1]


@few
@given(infos(passing | failing), truths, st.data())
def test_losing_a_needed_call_never_helps(o, gs, data):
    "Any rollout, any ground truth: a call is needed when without it less of the ground truth is matched."
    places = [(i, j) for i, t in enumerate(o['turns']) for j in range(len(t['calls']))]
    if not places: return
    i, j = data.draw(st.sampled_from(places))
    turns = [dict(t, calls=[c for k, c in enumerate(t['calls']) if (n, k) != (i, j)]) for n, t in enumerate(o['turns'])]
    full, less = Attempt.of(o), Attempt.of(o | dict(turns=turns))
    for g in gs:
        if worth(less, g) < worth(full, g):
            assert discrepancy(less, g) >= discrepancy(full, g) - 1e-12


@few
@given(infos(passing), st.integers(0, 5), truths)
def test_a_stopped_prefix_of_a_ground_truth_is_at_zero_in_its_actions(o, k, gs):
    g, cut = Attempt.of(o), Attempt.of(o | dict(turns=o['turns'][:k], finish='stopped'))
    assert parts(cut, g)['actions'] == 0 and parts(cut, g)['outcome'] == 1
    for other in gs:
        assert parts(cut, other)['actions'] <= parts(Attempt.of(o | dict(turns=o['turns'][:k])), other)['actions']


def test_what_was_spliced_in_is_no_work_of_the_policy():
    own, g = info(lost(2), {'t': True}), Attempt.of(info(good(), {'t': True}))
    mixed = info([lost(1)[0], good()[0] | dict(corrected=True, tokens=0), lost(1)[0]], {'t': True})
    assert Attempt.of(mixed) == Attempt.of(own) and discrepancy(Attempt.of(mixed), g) > 0


# ground truths with provenance

def trajectory(turns, tests, text=None, **more):
    ids = [[10 + i, 2] for i, _ in enumerate(turns)] if text is None else text
    segments = [Segment(np.array(x), 'tool_call', i, True) for i, x in enumerate(ids)]
    return Trajectory('k1', segments, 1., info=info(turns, tests) | more)


@pytest.mark.parametrize('name', ['g.jsonl', 'g.parquet'])
def test_ground_truths_keep_their_provenance(tmp_path, name):
    a = GroundTruth(trajectory(good(), {'t': True}), 'person', 'Ada', 'tests run twice', 'reads first')
    b = GroundTruth(trajectory(good()[1:], {'t': True}), 'teacher', 'script 3', 'hidden tests')
    assert save_ground_truths(tmp_path / name, [a, b]) == 2
    back = load_ground_truths(tmp_path / name)
    assert back == {'k1': [a, b]} and back['k1'][0].episode.ids == ((10, 2), (11, 2), (12, 2))
    assert rft_reward(back['k1'][1].episode, [g.episode for g in back['k1']]) == 1


@pytest.mark.parametrize('change, message', [
    (dict(tests={'t': True, 'u': False}), r'k1.*do not pass \(u\)'),
    (dict(tests={}), 'none recorded'),
    (dict(finish='cap'), "'cap'"),
    (dict(turns=None), 'turns')])
def test_a_ground_truth_that_is_none_is_refused(tmp_path, change, message):
    t = trajectory(good(), {'t': True})
    bad = replace(t, info=t.info | change)
    with pytest.raises(ValueError, match=message):
        GroundTruth(bad, 'person', 'Ada', 'by eye')
    said = dict(source='person', author='Ada', verified='x', style='')
    write_jsonl(tmp_path / 'g.jsonl', [replace(x, info=x.info | dict(ground_truth=said)) for x in (t, bad)])
    with pytest.raises(ValueError, match='g.jsonl: record 1: .*' + message):
        load_ground_truths(tmp_path / 'g.jsonl')


def test_provenance_must_be_there(tmp_path):
    t = trajectory(good(), {'t': True})
    for kw in (dict(source='web'), dict(author=''), dict(verified='')):
        with pytest.raises(ValueError, match=next(iter(kw))):
            GroundTruth(t, **(dict(source='person', author='Ada', verified='twice') | kw))
    write_jsonl(tmp_path / 'g.jsonl', [t])
    with pytest.raises(ValueError, match='record 0.*ground_truth'):
        load_ground_truths(tmp_path / 'g.jsonl')


# corrections

def test_the_nearest_ground_truth_goes_on_where_the_rollout_left_it():
    near = Attempt.of(trajectory([one('view'), one('edit'), one('submit')], {'t': True}))
    far = Attempt.of(trajectory([one('fly')] * 3, {'t': True}, [[90], [91], [92]]))
    m = Monitor([far, near], threshold=.3, patience=2, corrections=2)
    said = [m.observe(t) for t in [one('view'), *lost(2)]]
    assert said == ['go', 'go', 'correct'] and m.correction.tolist() == [11, 2] and m.correction.dtype == np.int32
    assert m.observe(one('edit') | dict(corrected=True)) == 'go' and m.correction is None
    assert [m.observe(t) for t in lost(2)] == ['go', 'correct'] and m.correction.tolist() == [12, 2]
    assert [m.observe(t) for t in lost(2)] == ['go', 'stop']       # no corrections left


def test_a_ground_truth_with_nothing_left_to_show_cannot_correct():
    m = Monitor([Attempt.of(trajectory([one('view')], {'t': True}))], threshold=.3, patience=2, corrections=9)
    assert [m.observe(t) for t in [one('view'), *lost(2)]] == ['go', 'go', 'stop']


@few
@given(infos(failing), truths, st.integers(0, 3))
def test_a_monitor_corrects_at_most_so_often_and_shows_what_was_not_done(o, gs, corrections):
    gs = [replace(g, ids=tuple((i,) for i in range(len(g.turns)))) for g in gs]
    m, said = Monitor(gs, threshold=.4, patience=1, corrections=corrections), []
    for t in o['turns']:
        said.append(m.observe(t))
        if said[-1] == 'correct':
            i, = m.correction
            assert any(sum(g.turns[:i + 1], Counter()) - m.made for g in gs if i < len(g.turns))
            assert any(name in ('view', 'edit', 'test') for g in gs if i < len(g.turns) for name, _ in g.turns[i])
    assert said.count('correct') <= corrections and (corrections or 'correct' not in said)


def test_corrections_that_cannot_be():
    bare = Attempt.of(info(good(), {'t': True}))
    with pytest.raises(ValueError, match='ground truth 0 has no token ids'):
        Monitor([bare], corrections=1)
    with pytest.raises(ValueError, match='corrections=-1'):
        Monitor([bare], corrections=-1)
    with pytest.raises(ValueError, match="can't be replayed"):
        shadow([info(good(), {'t': True})], [[bare]], corrections=1)
    with pytest.raises(ValueError, match="'infra'"):
        Attempt.of(info(good(), {}, finish='infra'))
    for w in (dict(outcome=1., patch=1.), dict(outcome=1., patch=-1., actions=0.)):
        with pytest.raises(ValueError, match='weights'):
            discrepancy(bare, bare, w)


# corrections and replays in the agent loop

@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(['def total(a, b):\n    return a + b\n'] * 3, 320)


@pytest.fixture(scope='module')
def make_env():
    pool, cache = MeteredPool(workers=1, trust='generated'), {}
    yield lambda _: MicroEnv(pool, cache)
    pool.close()


class Lister:
    def act(self, text):
        return [ToolCall('list')]


class Odd:
    "Says the same text each turn, with log-probs of its own."
    sampling = dict(temperature=1.0)
    def __init__(self, tok, text, finish='stop'):
        self.ids, self.finish, self.calls = np.array(tok.encode(text), np.int32), finish, 0
    def act(self, episodes):
        self.calls += len(episodes)
        logprobs, entropy = (np.full(len(self.ids), x, np.float32) for x in (-.5, .25))
        return [Completion(self.ids, logprobs.copy(), entropy.copy(), self.finish, 3) for _ in episodes]


@pytest.fixture(scope='module')
def solved(tok, make_env):
    "A task and an expert's passing trajectory."
    tasks = [make_task('train', i) for i in range(6)]
    out = rollout(ScriptPolicy(tok, lambda e: Expert(e.task, e.seed)), tok, tasks, make_env, max_len=10**5)
    return next((t, o) for t, o in zip(tasks, out) if o.reward == 1)


def watcher(truth, **kw):
    m = Monitor([Attempt.of(truth)], **kw)
    def watch(e):
        said = m.observe(e.turns[-1])
        return m.correction if said == 'correct' else said
    return watch


@pytest.mark.parametrize('train', [False, True])
def test_a_corrected_rollout_solves_the_task_and_stays_token_exact(tok, make_env, solved, train):
    task, truth = solved
    policy = Odd(tok, '<tool_call>list</tool_call><|im_end|>')
    t, = rollout(policy, tok, [task], make_env, max_turns=40, max_len=10**5, train_corrections=train,
                 watch=watcher(truth, threshold=.01, patience=1, corrections=99))
    shown = [u for u in t.info['turns'] if u.get('corrected')]
    assert t.reward == 1 and t.info['finish'] == 'submit' and all(u['tokens'] == 0 for u in shown)
    assert [u['calls'] for u in shown][-1:] == [truth.info['turns'][-1]['calls']]
    spliced = [s for s in t.segments if s.event == 'correction']
    theirs = {tuple(s.ids) for s in truth.segments if s.trainable}
    assert spliced and all(tuple(s.ids) in theirs and s.trainable == train and s.logprobs is None for s in spliced)
    assert set(t.version[~np.isnan(t.logprobs)]) == {3} and all((s.version == -1).all() for s in spliced)
    own = [s for s in t.segments if s.trainable and s.event != 'correction']
    assert sum(map(len, own)) == sum(u['tokens'] for u in t.info['turns']) and len(own) == policy.calls
    # what the template would write
    dialogue = [dict(role='system', content=SYSTEM), dict(role='user', content=task.data['issue'])]
    env = make_env(task)
    asyncio.run(env.reset(task))
    for u in t.info['turns']:
        calls = [dict(type='function', function=dict(name=c['name'], arguments=c['arguments'])) for c in u['calls']]
        results = asyncio.run(env.step([ToolCall(c['name'], c['arguments']) for c in u['calls']])).results
        dialogue.append(dict(role='assistant', content='', tool_calls=calls))
        dialogue += [dict(role='tool', content=r.text) for r in results]
    while dialogue[-1]['role'] == 'tool':
        dialogue.pop()           # nothing comes after handing in
    assert np.array_equal(ids_of(render(tok, dialogue))[:len(t)], t.ids)


def test_watchers_must_be_understood(tok, make_env, solved):
    def play(said, **kw):
        policy = Odd(tok, '<tool_call>list</tool_call><|im_end|>')
        return rollout(policy, tok, [solved[0]], make_env, max_turns=2, watch=lambda e: said, **kw)
    for bad in (True, 'halt', [1, 2], np.zeros(0, np.int32)):
        with pytest.raises(ValueError, match='watch said'):
            play(bad)
    with pytest.raises(ValueError, match='leave out'):
        play(None, begin=[solved[1]])


@pytest.mark.parametrize('text, finish', [
    ('<tool_call>list</tool_call><|im_end|>', 'stop'),
    ('<tool_call>list</tool_call>', 'length'),
    ('hm <tool_call>fly</tool_call> <tool_call>list</tool_call><|im_end|>', 'stop')])
def test_a_replay_is_the_record_token_by_token(tok, make_env, solved, text, finish):
    task, truth = solved
    say = lambda **kw: rollout(Odd(tok, text, finish), tok, [task], make_env, max_len=10**5, **kw)[0]
    given = np.array(tok.encode('<tool_call>test</tool_call><|im_end|>'))
    whole = say(max_turns=5, watch=lambda e: given if len(e.turns) == 1 else None)
    cut = say(max_turns=5, watch=lambda e: given if len(e.turns) == 1 else 'stop' if len(e.turns) == 3 else None)
    assert cut.info['finish'] == 'stopped' and say(max_turns=5, begin=[cut]) == whole
    strange = replace(cut, segments=[replace(s, ids=s.ids + 1) if s.kind == 'tool_result' else s for s in cut.segments])
    with pytest.raises(ValueError, match='other tokens than the record'):
        say(begin=[strange])


def test_stopped_rollouts_played_to_their_end(tok, make_env):
    "Half of them would have been right: experts that a foolish monitor stopped."
    tasks = [make_task('train', i) for i in range(6)]
    expert = lambda: ScriptPolicy(tok, lambda e: Expert(e.task, e.seed))
    whole = rollout(expert(), tok, tasks, make_env, max_len=1024)
    cut = [replace(t, info=t.info | dict(finish='stopped', turns=[])) for t in whole]   # before their first turn
    for c in cut:
        c.segments = [s for s in c.segments if s.kind in ('system', 'user')]
    r = finish_stopped(expert(), tok, {t.id: t for t in tasks}, cut, make_env)
    assert (r['stopped'], r['finished'], r['passed']) == (6, 6, sum(t.reward == 1 for t in whole))
    played = [turn for t in whole for turn in t.info['turns']]
    assert r['turns'] == len(played) and r['tokens'] == sum(turn['tokens'] for turn in played)
    assert (r['lo'], r['hi']) == wilson(r['passed'], 6) and r['sandbox_s'] >= 0
    assert finish_stopped(expert(), tok, {t.id: t for t in tasks}, cut, make_env, n=2)['finished'] == 2
    none = finish_stopped(expert(), tok, {}, [], make_env)
    assert (none['finished'], none['lo'], none['hi'], none['tokens']) == (0, 0, 1, 0)


def test_corrections_that_are_trained_get_the_models_own_log_probs(make_env):
    """A corrected rollout of a model: without log-probs on the correction trainers refuse it,
    with them the sampled ones stay as recorded."""
    lm, tok = load_model(ROOT / 'data/base')
    task, engine = make_task('train', 0), HFEngine(lm, max_len=1024, slots=1)
    given = np.array(tok.encode('<tool_call>list</tool_call><|im_end|>'))
    t, = rollout(ModelPolicy(engine), tok, [task], make_env, max_turns=3, train_corrections=True,
                 watch=lambda e: given if len(e.turns) == 1 else None)
    engine.close()
    spliced = np.concatenate([np.full(len(s), s.event == 'correction') for s in t.segments])
    before = t.logprobs.copy()
    with pytest.raises(ValueError, match='no recorded log-prob'):
        make_row(t, 1.)
    with_logprobs(lm, [t], torch.float32, event='correction')
    assert np.array_equal(before[~spliced], t.logprobs[~spliced], equal_nan=True) and spliced.sum() == len(given)
    kept = t.logprobs.copy()
    make_row(t, 1.)
    with_logprobs(lm, [t], torch.float32)
    assert np.abs(kept - t.logprobs)[t.mask].max() < 1e-4

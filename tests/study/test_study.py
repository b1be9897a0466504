"Evaluation and emergence: the numbers against plain counting, the intervals against what they promise, faulty input"
import itertools, json, math, sys
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kat.core.io import MissingExtra
from kat.core.types import Trajectory
from kat.study.emergence import (bootstrap_weights, by_task, compare_models, entropy_split, measure, pattern,
                                 pattern_table, task_rows)
from kat.study.evaluate import (METRICS, count_episode, eval_record, load_eval, markdown_table, pass_at_k, save_eval,
                                solve_table, summary, wilson)

few = settings(max_examples=40, deadline=None)


def call(name='view', ok=True, **arguments):
    return dict(name=name, arguments=arguments, ok=ok)


def turn(*names, tokens=10, errors=0, entropy=None):
    calls = [call(n, i=i) for i, n in enumerate(names)]
    return dict(calls=calls, tokens=tokens, errors=errors, entropy_first=entropy)


def episode(task='t', turns=(), passed=True, finish='submit', **info):
    info |= dict(turns=list(turns), tests={'a': True, 'b': passed}, finish=finish)
    return Trajectory(task=task, segments=[], reward=float(passed), info=info)


def random_episodes(seed, n=40, samples=1):
    rng = np.random.default_rng(seed)
    names = np.array(['view', 'edit', 'test'])
    def one(i):
        turns = [turn(*rng.choice(names, rng.integers(0, 4)), entropy=float(rng.random()))
                 for _ in range(rng.integers(1, 7))]
        return episode(f'task{i}', turns, bool(rng.random() < .5), str(rng.choice(['submit', 'cap'])))
    return [one(i) for i in range(n) for _ in range(samples)]


# intervals and pass@k

@few
@given(st.integers(1, 600).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(.5, .999))
def test_wilson_solves_the_score_equation(kn, conf):
    k, n = kn
    lo, hi = wilson(k, n, conf)
    assert 0 <= lo <= k / n <= hi <= 1
    z = NormalDist().inv_cdf((1 + conf) / 2)
    for p, edge in ((lo, 0), (hi, 1)):
        if p != edge:
            assert math.isclose((k / n - p) ** 2, z * z * p * (1 - p) / n, rel_tol=1e-6, abs_tol=1e-12)


def test_wilson_published_values():
    assert wilson(0, 10) == pytest.approx((0, .2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((.2553, .3662), abs=1e-4)     # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((.0624, .1605), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize('args', [(3, 2), (-1, 2), (1, 2, 1.)])
def test_wilson_refuses(args):
    with pytest.raises(ValueError, match='wilson'):
        wilson(*args)


@few
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_mean_over_all_draws(nck):
    n, c, k = nck
    draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert math.isclose(pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12)


def test_pass_at_k_refuses():
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0)):
        with pytest.raises(ValueError, match='pass_at_k'):
            pass_at_k(n, c, k)
    with pytest.raises(ValueError):
        pass_at_k(np.array([]), np.array([]), 1)


# counting

def test_definitions_by_hand():
    e = episode(turns=[turn('view', 'view'), turn(), turn('edit', errors=3), turn('test', 'submit', 'submit')])
    e.info['turns'][3]['calls'][2]['arguments'] = {'i': 1}      # the second submit repeats the first
    e.info['turns'][2]['calls'][0]['ok'] = False
    s = summary([e])
    assert (s['turns'], s['calls'], s['critical_steps'], s['tokens']) == (4, 6, 7, 40)
    assert s['width'] == 2 and s['parallel'] == pytest.approx(2 / 3)
    assert s['redundant'] == pytest.approx(1 / 6) and s['failed_calls'] == pytest.approx(3 / 8)


def test_infra_is_excluded_and_counted_and_a_cap_is_not():
    es = [episode(), episode(passed=False, finish='infra'), episode(passed=False, finish='cap')]
    s = summary(es)
    assert (s['n'], s['masked'], s['solved'], s['rate'], s['truncated']) == (2, 1, 1, .5, .5)
    assert summary([]) | dict(lo=0, hi=1) == summary([es[1]]) | dict(lo=0, hi=1, masked=0)


def test_solved_needs_tests_and_reward():
    def s(tests, reward):
        return summary([Trajectory('t', [], reward, info=dict(turns=[], tests=tests))])['solved']
    assert s({'a': True}, .95) == 1                            # a shaped reward
    assert s({'a': True, 'b': False}, .9) == 0
    assert s({'a': True}, 0.) == 0 and s({'a': True}, None) == 0   # passes, but the environment did not pay
    assert s({}, 1.) == 1 and s({}, .5) == 0


def test_missing_turns_name_the_task():
    with pytest.raises(ValueError, match="task 'x7'.*turns"):
        summary([Trajectory('x7', [], 0.)])


def test_table_splits_add_up():
    es = [episode(passed=i % 3 == 0, family='fg'[i % 2], difficulty=i % 4) for i in range(24)] + [episode()]
    rows = solve_table(es)
    assert rows[0]['n'] == 25
    for by in ('family', 'difficulty'):
        assert sum(r['n'] for r in rows if r['by'] == by) == 24
        assert sum(r['solved'] for r in rows if r['by'] == by) == 8
    assert [r['value'] for r in rows if r['by'] == 'difficulty'] == [0, 1, 2, 3]
    assert markdown_table(rows).count('\n') == len(rows) + 1


# records

def test_record_round_trip_and_faults(tmp_path):
    r = eval_record('rl', random_episodes(0), random_episodes(1), seed=3)
    assert load_eval(save_eval(r, tmp_path / 'a' / 'eval.json')) == r and r['n'] == 40
    assert eval_record('base', [episode()])['greedy'] is None
    faults = {'{"stage": ': 'not a JSON', '[]': "'stage' is missing", '{"stage":"rl","n":1}': "'sampled' is missing"}
    for text, why in faults.items():
        f = tmp_path / 'bad.json'
        f.write_text(text)
        with pytest.raises(ValueError, match=why) as err:
            load_eval(f)
        assert str(f) in str(err.value)


def test_record_is_plain_json():
    json.dumps(eval_record('rl', [episode(turns=[])], []), allow_nan=False)


# emergence

@few
@given(st.integers(0, 10 ** 6), st.integers(1, 3))
def test_measure_is_plain_counting(seed, samples):
    es = random_episodes(seed, 12, samples)
    tasks = by_task(es)
    m = measure(*task_rows(tasks, list(tasks)), bootstrap_weights(len(tasks), 3))
    s = summary(es)
    for k in METRICS:
        assert math.isclose(m[k][0], s[k], abs_tol=1e-12), k
    widths = sorted(w for e in es for w in count_episode(e)['widths'])
    assert m['width_max'][0] == max(widths, default=0)
    if widths:
        assert m['width_p95'][0] == widths[math.ceil(.95 * len(widths) - 1e-9) - 1]


def test_a_replicate_is_a_resampled_data_set():
    es = random_episodes(5, 20)
    tasks, w = by_task(es), bootstrap_weights(20, 4, seed=2)
    assert (w.sum(1) == 20).all()
    m = measure(*task_rows(tasks, list(tasks)), w)
    for i in range(5):
        again = summary([e for e, k in zip(es, w[i]) for _ in range(int(k))])
        assert math.isclose(m['turns'][i], again['turns']) and math.isclose(m['width'][i], again['width'])


def test_compare_is_paired_seeded_and_does_not_care_for_order():
    b, a = random_episodes(1), random_episodes(2)
    rows = compare_models(b, a, n_boot=200)
    assert rows == compare_models(b[::-1], a[::-1], n_boot=200) != compare_models(b, a, n_boot=200, seed=1)
    assert all(r['change'] == r['change_lo'] == r['change_hi'] == 0 for r in compare_models(b, b, n_boot=50))
    shifted = [episode(e.task, e.info['turns'] + [turn('test')], e.reward > 0) for e in b]
    r = next(r for r in compare_models(b, shifted, n_boot=200) if r['metric'] == 'turns')
    assert r['change_lo'] == pytest.approx(1) and r['change_hi'] == pytest.approx(1)   # one turn more on every task
    assert r['before_hi'] - r['before_lo'] > .5


def test_many_samples_of_one_task_do_not_outweigh_another():
    long, short = episode('a', [turn('view')] * 6), episode('b', [turn('view')] * 2)
    rows = compare_models([long] * 5 + [short], [long, short], n_boot=10)
    assert rows[1]['metric'] == 'turns' and rows[1]['before'] == rows[1]['after'] == 4


def test_views():
    b = [episode('a', [turn('view')] * 6), episode('b', [turn('view')] * 2, False), episode('c', [turn('view')] * 2)]
    a = [episode('a', [turn('view')] * 4), episode('b', [turn('view')] * 2), episode('d'), episode('c', finish='infra')]
    rows = {(r['view'], r['metric']): r for r in compare_models(b, a, turn_cap=4, n_boot=20)}
    assert rows['all tasks', 'turns']['n'] == 2                       # c was lost after, d was not played before
    both = rows['solved by both', 'turns']
    assert (both['n'], both['before'], both['after']) == (1, 6, 4) and both['relative'] == pytest.approx(-1 / 3)
    cut = rows['first 4 turns', 'turns']
    assert (cut['before'], cut['after']) == (3, 3)
    assert rows['first 4 turns', 'truncated']['before'] == .5 and rows['first 4 turns', 'rate']['before'] == 0
    with pytest.raises(ValueError, match='no task'):
        compare_models(b[:1], a[1:2])


def test_patterns_add_up_to_the_parallel_rate():
    assert pattern(turn('test', 'edit')) == 'edit+test' and pattern(turn('view', 'view')) == 'view+view'
    assert pattern(turn(*['view'] * 5, 'edit')) == 'edit+view×5'
    b, a = random_episodes(3), random_episodes(4)
    for top in (2, 50):
        rows = pattern_table(b, a, top=top, n_boot=20)
        assert sum(r['before'] for r in rows) == pytest.approx(summary(b)['parallel'])
        assert sum(r['after'] for r in rows) == pytest.approx(summary(a)['parallel'])
    assert pattern_table([episode(turns=[turn('view')])], [episode()], n_boot=5) == []


def test_entropy_split():
    turns = [turn('view', entropy=.2), turn('view', 'view', entropy=.6), turn(entropy=9.)]
    es = [episode(f't{i}', turns) for i in range(5)]
    r = entropy_split(es, n_boot=20)
    assert r['single'][0] == pytest.approx(.2) and r['difference'] == pytest.approx((.4, .4, .4)) and r['n_multi'] == 5
    none = entropy_split([episode(turns=[turn('view', entropy=.2)])], n_boot=5)
    assert none['multi'] is None and none['difference'] is None


# figures

def synthetic_eval(stage, seed=0):
    part = dict(n=50, solved=20, rate=.4, lo=.28, hi=.54)
    return dict(stage=stage, n=50, seed=seed, sampled=part, greedy=part, families={f: part for f in 'abcde'})


def test_figures_are_small_and_the_same_each_time(tmp_path):
    from kat.study.plots import plot_emergence, plot_families, plot_learning, plot_loss, plot_stages
    from kat.core.figures import save_figure
    evals = [synthetic_eval(s, k) for s in ('sft', 'base', 'own') for k in range(2)]
    rows = [dict(step=i, reward=.1 * i, entropy=.5, loss=1 / (i + 1), stage='sft') for i in range(5)] + [dict(note='x')]
    b, a = random_episodes(1, 10), random_episodes(2, 10)
    quiet = [episode(f'task{i}', [turn('view')], False) for i in range(3)]        # no pattern, nothing solved
    figures = [plot_stages(evals), plot_stages([synthetic_eval('base')]), plot_families(evals), plot_learning(rows),
               plot_loss(rows[:5]), plot_emergence(b, a), plot_emergence(quiet, quiet), plot_stages(evals)]
    paths = [save_figure(f, tmp_path / 'f' / f'{i}.png', 'What it shows.', 'make it') for i, f in enumerate(figures)]
    for path in paths:
        assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and path.stat().st_size < 60_000
        assert path.with_suffix('.txt').read_text() == 'What it shows.\n\nRegenerated by: make it\n'
    assert paths[0].read_bytes() == paths[-1].read_bytes() != paths[1].read_bytes()


def test_figures_name_what_is_missing(monkeypatch):
    from kat.study.plots import curve, plot_families, plot_stages, stage_order
    assert stage_order([dict(stage=s) for s in ('own', 'rl', 'base')]) == ['base', 'rl', 'own']
    with pytest.raises(ValueError, match="'reward'.*'loss', 'step'"):
        curve([dict(step=1, loss=2)], 'reward')
    with pytest.raises(ValueError, match='no evaluation'):
        plot_stages([])
    with pytest.raises(ValueError, match='families'):
        plot_families([synthetic_eval('sft') | dict(families={})])
    monkeypatch.setitem(sys.modules, 'seaborn', None)
    with pytest.raises(MissingExtra, match=r"pip install -e '.*\[notebooks\]'"):
        plot_stages([synthetic_eval('sft')])

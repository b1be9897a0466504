"The recipe knows worlds by name only: caps, domains, teachers, faults, and one update of RL on a mixture"
import ast
import asyncio
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from toy_world import KeyEnv, Keys

from kat.core.io import UserError
from kat.core.types import Group
from kat.infer.engines import HFEngine
from kat.learn.rft import with_logprobs
from kat.learn.rl import RLTrainer
from kat.learn.training import load_model
from kat.envs.base import InfraError, make_world
from kat.study.evaluate import eval_record
from kat.study.plots import domains_of, plot_domains, plot_families
from kat.recipe.evaluation import evaluate
from kat.recipe.pipeline import ROOT, make_plan
from kat.recipe.presets import PRESETS
from kat.recipe.report import write_report
from kat.recipe.rollouts import (
    ModelPolicy, context_of, domain_facts, expert_data, rollout, slots_for, teachable, teacher)

MIXED = 'micro:0.5,toy-keys:0.5'


@pytest.fixture(scope='module')
def base():
    return load_model(ROOT / 'data/base')


@pytest.fixture(scope='module')
def update(base, tmp_path_factory):
    "One update of RL on a mixture, teachers in the groups: what `nbs/runs/40_rl` does, by the same calls."
    lm, tok = load_model(ROOT / 'data/base')
    world, facts, out = make_world(MIXED), {}, tmp_path_factory.mktemp('rl')
    context = context_of(world, lm)
    engine = HFEngine(lm, max_len=context, slots=slots_for(8, context), dtype=torch.bfloat16)
    todo, before = [world.train_task(0, i) for i in range(4)], [p.clone() for p in lm.parameters()]
    trainer = RLTrainer(lm, out, engine.update_weights, tok, groups_per_step=4, lr=1e-4)
    with world.open(1) as make_env:
        played = rollout(ModelPolicy(engine), tok, [task for task in todo for _ in range(2)], make_env, seed=5)
        shown = with_logprobs(lm, rollout(teacher(world, tok), tok, todo, make_env, seed=6))
    groups = [Group(task.id, played[2 * i:2 * i + 2] + [shown[i]]) for i, task in enumerate(todo)]
    trainer.train(iter(groups), 1, facts.update)
    engine.close()
    moved = sum(not torch.equal(p, q) for p, q in zip(before, lm.parameters()))
    return world, todo, groups, facts, moved


def test_an_update_on_a_mixture_moves_the_weights_and_its_groups_stay_apart(update):
    world, todo, groups, facts, moved = update
    assert {task.env for task in todo} == set(world.domains) and moved and facts['live_groups'] > 0
    for task, group in zip(todo, groups):
        assert {(t.info['domain'], t.task) for t in group.trajectories} == {(task.env, task.id)}
    taught = {task.env: group.trajectories[-1].reward for task, group in zip(todo, groups)}
    assert taught['toy-keys'] == 1


def test_each_domain_has_its_own_caps(update):
    _, todo, groups, *_ = update
    for task, group in zip(todo, groups):
        for t in group.trajectories[:2]:
            cap = make_world(task.env).env
            assert len(t.info['turns']) <= cap.max_turns and len(t.ids) <= cap.max_len
            assert t.sampling == dict(temperature=1.0, max_tokens=cap.max_tokens)


def test_rates_by_domain_reach_metrics_records_figures_and_the_report(update, tmp_path):
    _, _, groups, *_ = update
    played = [t for group in groups for t in group.trajectories]
    facts = domain_facts(played)
    assert {name.rpartition('/')[2] for name in facts} == {'n', 'solved', 'rate', 'lo', 'hi'}
    assert facts['toy-keys/n'] + facts['micro/n'] == len(played) and domains_of([facts]) == ['micro', 'toy-keys']
    assert 0 <= facts['toy-keys/lo'] <= facts['toy-keys/rate'] <= facts['toy-keys/hi'] <= 1
    record = eval_record('base', played, played, seed=0)
    assert set(record['domains']) == {'micro', 'toy-keys'}
    assert plot_domains([dict(step=i, **facts) for i in (1, 2, 3)]) and plot_families([record], by='domains')
    (tmp_path / 'eval').mkdir()
    (tmp_path / 'eval/base.json').write_text(json.dumps(record))
    (tmp_path / 'config.json').write_text(json.dumps(dict(preset='own', stages={'10_midtrain': {}},
                                                          machine=dict(cores=2, memory_gib=8))))
    page = write_report(tmp_path).read_text()
    assert 'By domain' in page and '<th>toy-keys</th>' in page
    alone = [replace(t, info={k: v for k, v in t.info.items() if k != 'domain'}) for t in played]
    assert domain_facts(alone) == {} and 'domains' not in eval_record('base', alone)
    with pytest.raises(ValueError, match='no domains'):
        plot_families([eval_record('base', alone)], by='domains')


def test_one_world_alone_carries_no_domain(base):
    _, tok = base
    world = make_world('toy-keys')
    with world.open() as make_env:
        out = expert_data(world, tok, world.heldout(3), make_env, 0)
    assert all(t.reward == 1 and 'domain' not in t.info and 'faults' not in t.info for t in out)


def faulty(where, limit):
    "Environments of which the first `limit` of a task fail there."
    made = Counter()
    def make_env(task):
        made[task.id] += 1
        env, mine = KeyEnv(), made[task.id]
        work = getattr(env, where)   # where it closes, every try has its grade already, and is void still
        async def fail(*given):
            if mine <= limit: raise InfraError('gone')
            return await work(*given)
        setattr(env, where, fail)
        return env
    return make_env


@pytest.fixture(scope='module')
def sampled(base):
    "Plays two tasks with the model, and what comes of it where nothing fails."
    lm, tok = base
    engine = HFEngine(lm, max_len=400, slots=2, dtype=torch.bfloat16)
    def play(make_env):
        return rollout(ModelPolicy(engine), tok, Keys().heldout(2), make_env, seed=3, max_turns=2)
    yield play, play(lambda task: KeyEnv())
    engine.close()


@pytest.mark.parametrize('where', ['reset', 'step', 'grade', 'close'])
def test_an_episode_lost_to_the_infrastructure_is_played_again_token_by_token(base, sampled, where):
    play, calm = sampled
    shaken = play(faulty(where, 2))
    assert [t.info.pop('faults') for t in shaken] == [2] * 2 and shaken == calm
    lost = rollout(teacher(Keys(), base[1]), base[1], Keys().heldout(2), faulty(where, 9), retries=1)
    assert [(t.reward, t.info['finish'], t.info['faults']) for t in lost] == [(None, 'infra', 2)] * 2


def test_a_lost_episode_without_a_token_can_stand_in_a_group(base, tmp_path):
    lm, tok = load_model(ROOT / 'data/base')
    task, = Keys().heldout(1)
    lost, = rollout(teacher(Keys(), tok), tok, [task], faulty('reset', 9))
    good, = rollout(teacher(Keys(), tok), tok, [task], lambda task: KeyEnv())
    lost.info['masked'] = 'infrastructure'
    good, bad = with_logprobs(lm, [good, replace(good, reward=0.)])
    trainer = RLTrainer(lm, tmp_path, None, tok, groups_per_step=1, lr=1e-4)
    assert trainer.train(iter([Group(task.id, [lost, good, bad])]), 1)


def test_a_step_that_hangs_is_the_infrastructures_fault(base):
    _, tok = base
    def make_env(task):
        env = KeyEnv()
        env.patience_s = 1e-3
        async def never(calls):
            await asyncio.Event().wait()
        env.step = never
        return env
    t, = rollout(teacher(Keys(), tok), tok, Keys().heldout(1), make_env, retries=1)
    assert (t.reward, t.info['finish'], t.info['faults']) == (None, 'infra', 2)


def test_caps_are_checked_against_the_model(base):
    lm, _ = base
    assert context_of(make_world('micro'), lm) == 1024 and context_of(make_world(MIXED), lm) == 1024
    assert context_of(make_world('toy-keys'), lm) == 400 and context_of(make_world('toy-keys'), lm, 4096, 99) == 4096
    for caps, words in [((4097,), 'the model has 4096 positions; set max_len to at most 4096'), ((64,), 'no room'),
                        ((0,), 'max_len=0'), ((-5,), 'max_len=-5'), ((None, 0), 'max_turns=0')]:
        with pytest.raises(UserError, match=words) as caught:
            context_of(make_world('micro'), lm, *caps)
        assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='max_turns=0'):
        rollout(None, None, [], None, max_turns=0)
    with pytest.raises(ValueError, match='retries=-1'):
        rollout(None, None, [], None, retries=-1)
    assert slots_for(256, 1024) == 256 and slots_for(256, 32768) == 32 and slots_for(8, 2**30) == 1 == slots_for(0, 9)


def test_what_nobody_shows_is_left_out_or_refused():
    mute, both = make_world('toy-mute'), make_world('toy-mute,toy-keys')
    with pytest.raises(UserError, match='envs=toy-mute: no expert .* no lessons'):
        teachable(mute, [mute.train_task(0, i) for i in range(3)], 'lessons')
    tasks = [both.train_task(0, i) for i in range(8)]
    assert {task.env for task in teachable(both, tasks, 'lessons')} == {'toy-keys'} and teachable(mute, [], '') == []


def test_too_few_held_out_tasks_are_refused(tmp_path, base):
    with pytest.raises(UserError, match='n_eval=41: toy-keys has 40 held-out tasks'):
        evaluate(*base, 'base', tmp_path, Keys(), 41)
    with pytest.raises(UserError, match='n_eval=0'):
        evaluate(*base, 'base', tmp_path, Keys(), 0)


def test_a_plan_with_an_unknown_world_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="no environment 'mirco'; known: .*micro"):
        make_plan('smoke', ROOT / 'nbs/runs', ['envs=mirco:1'])
    plan = make_plan('smoke', ROOT / 'nbs/runs', [f'envs={MIXED}', 'max_turns=9', 'max_len=2000'])
    assert {values['envs'] for values in plan.values() if 'envs' in values} == {MIXED}
    assert plan['40_rl']['max_turns'] == 9 and plan['00_data']['max_len'] == 2000


def imports(source):
    "The modules that Python source names in its imports."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{name.name}' for name in node.names} | {node.module or ''}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_recipe_and_study_import_no_world():
    "What they need they ask the world for; of `kat.envs` they know the interface."
    sources = {path: path.read_text() for part in ('recipe', 'study') for path in (ROOT / 'kat' / part).glob('*.py')}
    for stage in PRESETS['tiny']:
        notebook = json.loads((ROOT / f'nbs/runs/{stage}.ipynb').read_text())
        cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
        sources[stage] = '\n'.join(cells)
    # what every world stands on, and the formats of files, are no world
    world = re.compile(r'(^|\.)envs\.(?!(base|foreign|future|grade|sandbox|tasks|walls)\b)')
    known = {str(name): sorted(module for module in imports(source) if world.search(module))
             for name, source in sources.items()}
    assert len(known) > 15 and {name: modules for name, modules in known.items() if modules} == {}
    number = re.compile(r'max_(len|turns)\s*(: int)?\s*=\s*\d')   # caps are the environment's, or given
    assert [str(name) for name, source in sources.items() if number.search(source)] == []



"""Who works when: every mode, split, staleness and size under the policy of `kat.cluster`, on recorded episodes

    python benchmarks/cluster.py record data/runs/tiny   # data/traces/micro.json, from the model after SFT (a minute)
    python benchmarks/cluster.py generate                # data/traces/agentic.json and heavy.json
    python benchmarks/cluster.py study                   # figures/cluster.json (about 25 CPU minutes; resumable)
    python benchmarks/cluster.py draw                    # figures/cluster_*.png and cluster.md from it

The recordings are committed before the study is run. Each cell is one replay; what is computed is kept in
data/runs/cluster. Every cell is reported. `crowd` is episodes per slot: what is best differs between modes, so each
mode gets the better of 1 and 2."""
import argparse
import json
import sys
import time
from pathlib import Path

from kat.cluster.groups import Groups
from kat.cluster.simulate import Hardware, Recording, Replay, draw_gantt, generate_recording, read_recording
from kat.cluster.tags import Ask, Device, colocated, disaggregated, multiplexed
from kat.core.figures import save_figure, use_style
from kat.core.io import atomic

ROOT = Path(__file__).parents[1]
TRACES, KEPT, FIGURES = ROOT/'data/traces', ROOT/'data/runs/cluster', ROOT/'figures'
COMMAND = 'python benchmarks/cluster.py'


def write(recording):
    TRACES.mkdir(exist_ok=True)
    body = dict(name=recording.name, source=recording.source, groups=recording.groups)
    with atomic(TRACES/f'{recording.name}.json') as tmp:
        tmp.write_text(json.dumps(body, separators=(',', ':')) + '\n')


def record(run, tasks=48, size=8):
    "Play training tasks with a run's model; per turn: tokens sampled, seconds in the sandbox, tokens read."
    from kat.envs.base import make_world
    from kat.infer.engines import HFEngine
    from kat.learn.training import load_model
    from kat.recipe.rollouts import ModelPolicy, rollout
    model, tokenizer = load_model(run/'20_sft/model')
    engine, world, taken = HFEngine(model, max_len=1024, slots=tasks*size), make_world('micro'), {}
    todo = [world.train_task(0, 8*10**5 + i//size) for i in range(tasks*size)]
    def timed(env, number):
        step, taken[number] = env.step, []
        async def measured(calls):
            begun = time.perf_counter()
            try:
                return await step(calls)
            finally:
                taken[number].append(round(time.perf_counter() - begun, 4))
        env.step = measured
        return env
    with world.open() as make_env:
        played = rollout(ModelPolicy(engine), tokenizer, todo, lambda task: timed(make_env(task), len(taken)), seed=0,
                         retries=0)
    episodes = [episode(t, taken[i]) for i, t in enumerate(played)]
    source = (f'{tasks} training tasks of the micro world, {size} rollouts each, by the model after SFT of '
              '`kat pipeline --preset tiny`; tools run two at a time on two shared cores')
    write(Recording('micro', source, [episodes[i:i + size] for i in range(0, len(episodes), size)]))


def episode(trajectory, seconds):
    "Tokens per turn; what stands between two answers was read after the first."
    turns, prompt, last = [], 0, None
    for segment in trajectory.segments:
        if segment.trainable:
            if segment.turn != last:
                turns.append([0, 0, 0])
            turns[-1][0] += len(segment.ids)
            last = segment.turn
        elif turns:
            turns[-1][2] += len(segment.ids)
        else:
            prompt += len(segment.ids)
    for turn, took in zip(turns, seconds):
        turn[1] = took
    return dict(prompt=prompt, turns=turns)


def generate():
    write(generate_recording('agentic', seed=0))
    write(generate_recording('heavy', seed=1, turns=(2.3, .9), tokens=(5.0, 1.3), tools=(.5, 1.8)))


def cluster(mode, number, train, mix='equal'):
    "Devices of a mode; `half`: every other one is half as fast."
    made = dict(colocated=colocated, multiplexed=multiplexed, disaggregated=disaggregated)[mode]
    devices = made(number) if mode == 'colocated' else made(number, train)
    if mix == 'equal': return devices
    # a split that knows its devices trains on the fast ones, which are `train` and what is left of the first half
    slow = number//2
    return [Device(d.name, d.tags, .5 if i >= number - slow else 1.0, d.slots) for i, d in enumerate(devices)]


def cell(trace='agentic', mode='colocated', number=16, train=16, staleness=1, late='drop', crowd=1, per=6, mix='equal',
         scaling=1.0, updates=4, warmup=2, **machine):
    return dict(trace=trace, mode=mode, number=number, train=train, staleness=staleness, late=late, crowd=crowd,
                per=per, mix=mix, scaling=scaling, updates=updates, warmup=warmup, machine=machine)


def placements(number, static=range(4, 13), shared=(8, 10, 12, 14)):
    "Train-tagged devices, in sixteenths."
    yield 'colocated', number
    yield from (('multiplexed', number*x//16) for x in shared)
    yield from (('disaggregated', number*x//16) for x in static)


def sweep(number=16, crowds=(1, 2), stalenesses=(0, 1, 2), static=range(4, 13), shared=(8, 10, 12, 14),
          **more):
    return [cell(mode=mode, number=number, train=train, staleness=s, crowd=crowd, **more)
            for s in stalenesses for crowd in crowds for mode, train in placements(number, static, shared)]


def plan():
    one, few = dict(stalenesses=(1,), crowds=(2,)), dict(static=(6, 7, 8, 9), shared=(10, 12, 14))
    cells = sweep() + sweep(trace='micro') + sweep(trace='heavy')
    cells += sweep(stalenesses=(1, 2), crowds=(2,), late='keep') + sweep(**one, chunked=True)
    cells += sweep(**one, mix='half', shared=(6, 8, 10, 12, 14)) + sweep(**one, scaling=.9)
    cells += sweep(**one, sync=12.0, take=18.0, back=12.0) + sweep(**one, trace='micro', sync=.1, take=.1, back=.1)
    cells += sweep(number=64, per=2, crowds=(1,), updates=3, warmup=1, **few)   # few sequences a device
    cells += sweep(number=64, **one, updates=3, warmup=1, **few)
    cells += sweep(number=256, **one, updates=2, warmup=1, **few)
    cells += [cell(mode=mode, number=size, train=size*share//16, crowd=2, updates=1, warmup=1) for size in (1024, 4096)
              for mode, share in (('multiplexed', 14), ('disaggregated', 9), ('colocated', 16))]
    return cells


def key(c):
    return '-'.join(str(x) for x in [*list(c.values())[:-1], *(f'{k}={v}' for k, v in c['machine'].items())])


def compute(c):
    machine = Hardware(crowd=c['crowd'], **c['machine'])
    recording = read_recording(TRACES/f'{c["trace"]}.json')
    begun = time.perf_counter()
    replay = Replay(recording, cluster(c['mode'], c['number'], c['train'], c['mix']),
                    Groups(c['per']*c['number'], c['staleness'], recording.size, c['late']), machine,
                    (Ask('train', gang=0, scaling=c['scaling']), Ask('rollout')))
    out = replay.run(c['updates'], c['warmup'])
    return c | dict(result=rounded(out), took=round(time.perf_counter() - begun, 1))


def rounded(x):  # five digits
    if isinstance(x, dict): return {name: rounded(value) for name, value in x.items()}
    return float(f'{x:.5g}') if isinstance(x, float) else x


def study():
    KEPT.mkdir(parents=True, exist_ok=True)
    cells, begun, fresh = plan(), time.perf_counter(), 0
    for i, c in enumerate(cells):
        path = KEPT/f'{key(c)}.json'
        if path.exists(): continue
        done = compute(c)
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(done))
        fresh += 1
        print(f'{i + 1}/{len(cells)} {key(c)}: {done["result"]["tokens_s"]:.0f} tokens/s, {done["took"]} s; '
              f'{time.perf_counter() - begun:.0f} s so far', flush=True)
        collect(cells)
    collect(cells)


def collect(cells):
    rows = [json.loads(path.read_text()) for c in cells if (path := KEPT/f'{key(c)}.json').exists()]
    with atomic(FIGURES/'cluster.json') as tmp:
        tmp.write_text(json.dumps(dict(command=f'{COMMAND} study', planned=len(cells), cells=rows), indent=None,
                                  separators=(',', ':')).replace('{"trace"', '\n{"trace"') + '\n')


SETTINGS = {   # of the table, by what tells their cells from the others
    '16, agentic, η 0': dict(staleness=0), '16, agentic, η 1': dict(), '16, agentic, η 2': dict(staleness=2),
    'late ones kept, η 1': dict(late='keep'), 'late ones kept, η 2': dict(late='keep', staleness=2),
    'neighbours go on': dict(machine=dict(chunked=True)),
    'switch and sync × 3': dict(machine=dict(sync=12.0, take=18.0, back=12.0)),
    'training scales as k^0.9': dict(scaling=.9),
    'half of the devices half as fast': dict(mix='half'),
    'heavy, η 0': dict(trace='heavy', staleness=0), 'heavy, η 1': dict(trace='heavy'),
    'heavy, η 2': dict(trace='heavy', staleness=2), 'micro (measured), η 0': dict(trace='micro', staleness=0),
    'micro (measured), η 1': dict(trace='micro'), 'micro (measured), η 2': dict(trace='micro', staleness=2),
    'micro, η 1, switch and sync 0.1 s': dict(trace='micro', machine=dict(sync=.1, take=.1, back=.1)),
    '64, latency-bound, η 0': dict(number=64, per=2, staleness=0), '64, latency-bound, η 1': dict(number=64, per=2),
    '64, latency-bound, η 2': dict(number=64, per=2, staleness=2), '64, η 1': dict(number=64),
    '256, η 1': dict(number=256), '1,024, η 1': dict(number=1024), '4,096, η 1': dict(number=4096)}
COMMON = dict(trace='agentic', number=16, staleness=1, late='drop', per=6, mix='equal', scaling=1.0, machine={})


def best(cells, setting, mode):
    "The cell of most trained tokens/s, None where there is none."
    wanted = COMMON | setting | dict(mode=mode)
    found = [c for c in cells if all(c[name] == value for name, value in wanted.items())]
    return max(found, key=lambda c: c['result']['tokens_s'], default=None)


def table(cells):
    lines = ['| devices, recording | best static split: tokens/s, idle | best multiplexed: tokens/s, idle, '
             'switch + sync, dropped | ÷ static | co-located: tokens/s, idle, switch + sync, dropped '
             '| multiplexed ÷ co-located |',
             '|---|---|---|---|---|---|']
    for name, setting in SETTINGS.items():
        static, shared, same = (best(cells, setting, mode) for mode in ('disaggregated', 'multiplexed', 'colocated'))
        if not (static and shared and same): continue
        lines.append(f'| {name} | {place(static)}: {number(static)}, {share(static, "idle")} | {place(shared)}: '
                     f'{number(shared)}, {facts(shared)} | **{ratio(shared, static):.2f}** | {number(same)}, '
                     f'{facts(same)} | {ratio(shared, same):.2f} |')
    return '\n'.join(lines)


def place(c):
    return f'{c["train"]} train' + (', crowd 2' if c['crowd'] == 2 else '')


def number(c):
    return f'{c["result"]["tokens_s"]:,.0f}'


def ratio(one, other):
    return one['result']['tokens_s']/other['result']['tokens_s']


def share(c, *names):
    return f'{100*sum(c["result"][name] for name in names):.1f} %'


def facts(c):
    return f'{share(c, "idle")}, {share(c, "switch", "sync")}, {share(c, "dropped")}'


def draw():
    saved = json.loads((FIGURES/'cluster.json').read_text())
    cells = saved['cells']
    head = (f'{len(cells)} of {saved["planned"]} cells. η: staleness bound. Of each mode the best split and crowd; '
            f'`figures/cluster.json` has every cell. Regenerated by: {COMMAND} draw')
    with atomic(FIGURES/'cluster.md') as tmp:
        tmp.write_text(head + '\n\n' + table(cells) + '\n')
    splits(cells)
    gantt()


def splits(cells):
    plt, _ = use_style()
    fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
    for staleness, ax in enumerate(axes):
        for mode, colour in dict(disaggregated='#d55e00', multiplexed='#0173b2').items():
            here = [[c for c in cells if all(c[k] == v for k, v in (COMMON | dict(
                staleness=staleness, mode=mode, train=train)).items())] for train in range(1, 17)]
            points = [max(c['result']['tokens_s'] for c in group) for group in here if group]
            ax.plot([group[0]['train'] for group in here if group], points, marker='o', color=colour, label=mode)
        same = best(cells, dict(staleness=staleness), 'colocated')
        ax.plot([16], [same['result']['tokens_s']], marker='s', color='#029e73', linestyle='', label='co-located')
        ax.set(title=f'staleness {staleness}', xlabel='devices of 16 that can train', xticks=range(4, 17, 2))
    axes[0].set(ylabel='trained tokens/s', ylim=(0, 1.05*max(ax.dataLim.y1 for ax in axes)))
    axes[0].legend(loc='upper left')
    save_figure(fig, FIGURES/'cluster_splits.png', 'Trained tokens a second by split, 16 simulated devices, generated '
                'recording `agentic`; of each split the better of 1 and 2 episodes per slot.', f'{COMMAND} draw')


def gantt():
    plt, _ = use_style()
    recording = read_recording(TRACES/'agentic.json')
    fig, axes = plt.subplots(3, 1, figsize=(9, 6), sharex=True)
    for (mode, train), ax in zip(dict(disaggregated=9, multiplexed=14, colocated=16).items(), axes):
        replay = Replay(recording, cluster(mode, 16, train), Groups(96, 1, 8), Hardware(crowd=2), gantt=True)
        replay.run(3, 2)
        begin = replay.steps[1][0]
        spans = [(who, what, a - begin, b - begin) for who, what, a, b in replay.spans]
        draw_gantt(spans, 0, 700, f'{mode}, {train} can train' if mode != 'colocated' else 'co-located', ax)
        ax.set_xlabel('')
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside upper right', ncols=4)
    axes[2].set_xlabel('seconds after the second update')
    save_figure(fig, FIGURES/'cluster_gantt.png', 'Who does what, 16 simulated devices at staleness 1; white is idle.',
                f'{COMMAND} draw')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('what', choices=['record', 'generate', 'study', 'draw'])
    parser.add_argument('run', nargs='?', type=Path)
    given = parser.parse_args()
    if given.what == 'record':
        record(given.run or sys.exit('record needs the folder of a run, as data/runs/tiny'))
    else:
        globals()[given.what]()

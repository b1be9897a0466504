"Sweeps: every combination once, resumed, failing points named; a dry run leaves no trace"
import itertools
import json
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from kat.cluster.launch import NotebookFailed
from kat.cluster.sweep import report_metrics, run_sweep, split_values, sweep_points, sweep_table
from kat.core.io import UserError


def study(folder, code='pass'):
    declared = new_code_cell('lr: float = 0.1\nseed: int = 0\nname: str = ""\nsizes: list[str] = []',
                             metadata=dict(tags=['parameters']))
    nbformat.write(new_notebook(cells=[declared, new_code_cell(code)]), folder/'study.ipynb')
    return folder/'study.ipynb'


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(), st.floats(allow_nan=False), st.lists(st.text(max_size=5), max_size=3)),
                min_size=1, max_size=5))
def test_values_are_parted_where_json_ends(values):
    "But for quotes within quotes, which JSON escapes"
    texts = [json.dumps(value) for value in values]
    if not any('\\' in text or "'" in text for text in texts):
        assert split_values(','.join(texts)) == texts


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec='utf-8'), max_size=130), min_size=1, max_size=4, unique=True),
       st.integers(1, 3))
def test_points_are_all_combinations_and_no_two_share_a_folder(tmp_path_factory, names, seeds):
    notebook = study(tmp_path_factory.mktemp('study'))
    names = [name for name in names if not set(name) & set(',\'"()[]{}')]
    if not names: return
    sweeps = ['name=' + ','.join(names), 'seed=' + ','.join(map(str, range(seeds)))]
    points = sweep_points(notebook, ['lr=0.5'], sweeps)
    assert [(one.values['name'], one.values['seed']) for one in points] == list(itertools.product(names, range(seeds)))
    assert len({one.name for one in points}) == len(points) and all(one.values['lr'] == .5 for one in points)
    assert all('/' not in one.name and len(one.name.encode()) < 255 for one in points)


@pytest.mark.parametrize('pairs, sweeps, words', [
    ([], ['seeds=1,2'], "unknown parameter 'seeds' of study.ipynb, did you mean seed"),
    ([], ['lr=1,x'], "'x' is not of type float"),
    ([], ['lr=1', 'lr=2'], 'given twice'), ([], ['seed=1,1'], 'there twice'),
    (['lr=1'], ['lr=1,2'], 'it is swept as well'), ([], ['lr'], 'key=value')])
def test_mistakes_are_told_before_anything_runs(tmp_path, pairs, sweeps, words):
    with pytest.raises(UserError, match=words):
        sweep_points(study(tmp_path), pairs, sweeps)


def test_a_sweep_goes_on_past_a_failure_and_after_one(tmp_path):
    notebook, ran, broken = study(tmp_path), [], {1}
    points = sweep_points(notebook, [], ['seed=0,1,2'])
    def run(folder, values):
        ran.append(values['seed'])
        if values['seed'] in broken: raise NotebookFailed(notebook, folder, 3, 'ValueError', 'it diverged')
        (folder/'metrics.json').write_text(json.dumps(dict(loss=values['seed']/2)))
    lines = []
    rows = run_sweep(notebook, points, tmp_path/'sweep', run, lines.append)
    assert ran == [0, 1, 2] and [bool(row['failed']) for row in rows] == [False, True, False]
    assert lines[1] == '2/3 seed=1: FAILED: study: cell [3]: ValueError: it diverged'
    assert sweep_table(rows) == [['seed', 'loss', 'failed'], ['0', '0', ''], ['1', '–', 'yes'], ['2', '1', '']]
    broken.clear()
    rows = run_sweep(notebook, points, tmp_path/'sweep', run, lines.append)
    assert ran == [0, 1, 2, 1] and sweep_table(rows)[1:] == [['0', '0'], ['1', '0.5'], ['2', '1']]
    study(tmp_path, 'print("other code")')
    with pytest.raises(UserError, match='seed=0 was made with other parameters or by another version'):
        run_sweep(notebook, points, tmp_path/'sweep', run, lines.append)
    assert len(ran) == 4


def test_metrics_are_printed_outside_and_of_rank_0_inside(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('KAT_METRICS', raising=False)
    report_metrics(loss=1)
    assert capsys.readouterr().out == "{'loss': 1}\n"
    monkeypatch.setenv('KAT_METRICS', str(tmp_path/'metrics.json'))
    for rank, metrics in ('0', dict(loss=2)), ('1', dict(loss=9)), ('0', dict(steps=3)):
        monkeypatch.setenv('RANK', rank)
        report_metrics(**metrics)
    assert json.loads(Path(tmp_path/'metrics.json').read_text()) == dict(loss=2, steps=3)

"kat tree: the table, the picture, one line for a mistake"
import json
from functools import partial
from pathlib import Path
from shutil import copy

import pytest

import kat.recipe.pipeline
from kat.core.io import write_records
from kat.core.types import Segment, Trajectory

ROOT = Path(__file__).parents[2]
LOG = ROOT/'data'/'trajectories'/'swe_smith_pandas_53652.json'


@pytest.fixture
def cli(cli, tmp_path):
    "Runs `kat tree` with these arguments in a folder with a log of ids; (exit code, what it printed, and complained)."
    segments = [Segment([1, 2], 'user'), Segment([3], 'assistant', 0, True), Segment([4], 'user', 1),
                Segment([5], 'assistant', 1, True)]
    write_records('ids.parquet', [Trajectory('t', segments)])
    (tmp_path/'odd.jsonl').write_text('{"a": 1}\n')
    (tmp_path/'none.jsonl').write_text('')
    return partial(cli, 'tree')


def test_stats_of_a_log(cli):
    code, out, err = cli('stats', LOG)
    assert (code, err) == (0, '') and 'episodes 1, tasks 1, model calls 8' in out and 'data/base' in out
    rows = [' '.join(line.split()) for line in out.splitlines()]
    assert 'per-call flat 8 11,187 9.23 M 76.8 G 230 G' in rows
    assert 'linearly merged 1 2,245 2.52 M 17.5 G 52.4 G' in rows
    assert 'linearly merged per-call flat 0.799 4.98× 3.66× 4.40×' in rows
    assert 'tree, one per task linearly merged 0.000 1.00× 1.00× 1.00×' in rows


def test_a_table_of_conversations_is_a_log_and_no_table_of_ids(cli):
    from kat.core.log_exports import write_conversations
    from kat.core.logs import import_log
    write_conversations(Path('table.parquet'), import_log(LOG))
    same = lambda out: [line for line in out.splitlines() if '×' in line]
    code, out, err = cli('stats', 'table.parquet')
    assert (code, err) == (0, '') and same(out) == same(cli('stats', LOG)[1])
    Path('cut.parquet').write_bytes(Path('table.parquet').read_bytes()[:-9])
    code, out, err = cli('stats', 'cut.parquet')
    assert code == 2 and out == '' and err.count('\n') == 1 and 'cut.parquet' in err


def test_stats_of_openai_messages(cli, tmp_path):
    turn = lambda n: [{'role': 'user', 'content': f'question {n}'}, {'role': 'assistant', 'content': f'answer {n}'}]
    first = {'messages': [{'role': 'system', 'content': 'You help.'}, *turn(1), *turn(2)]}
    other = {'messages': [{'role': 'system', 'content': 'You help.'}, *turn(1), *turn(3)]}
    (tmp_path/'chat.jsonl').write_text(''.join(json.dumps(dialogue) + '\n' for dialogue in (first, other)))
    code, out, err = cli('stats', 'chat.jsonl')
    assert (code, err) == (0, '') and 'model calls 4' in out and 'tree' in out
    assert cli('draw', 'chat.jsonl', '-o', 'chat.png') == (0, 'chat.png\n', '')


def test_stats_of_records_need_no_tokenizer(cli):
    code, out, err = cli('stats', 'ids.parquet')
    assert (code, err) == (0, '') and 'none, the log holds ids' in out and 'no FLOPs' in out
    assert 'per-call flat 2 8 21 – –' in ' '.join(out.split())
    code, out, err = cli('stats', 'ids.parquet', '--model', ROOT/'data'/'base')
    assert code == 0 and 'hidden 192' in out and '–' not in out.replace('1/(1−POR)', '')


def test_a_tokenizer_whose_model_is_unknown_still_counts_tokens(cli, tmp_path):
    for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
        copy(ROOT/'data'/'base'/name, tmp_path)
    (tmp_path/'config.json').write_text('{"model_type": "gpt2"}')
    code, out, err = cli('stats', LOG, '--tokenizer', '.')
    assert code == 0 and "no FLOPs: model type 'gpt2'" in out and '11,187' in out


def test_draw(cli, tmp_path):
    assert cli('draw', LOG, '-o', 'pictures/tree.png') == (0, 'pictures/tree.png\n', '')
    assert (tmp_path/'pictures'/'tree.png').read_bytes()[:4] == b'\x89PNG'
    assert cli('draw', 'ids.parquet', '-o', 'tree.svg') == (0, 'tree.svg\n', '')


@pytest.mark.parametrize('args, parts', [
    ('', ['Missing command', 'kat tree --help']), ('stats', ['FILE', 'kat tree stats --help']),
    ('stats gone.json', ['no file gone.json']), ('stats odd.jsonl', ['odd.jsonl:1: not a log of', 'its fields: a']),
    ('stats none.jsonl', ['none.jsonl: empty']), ('stats LOG --tokenizer .', ['--tokenizer .: no tokenizer there']),
    ('stats ids.parquet --tokenizer .', ['holds token ids already']),
    ('stats LOG --model .', ['config.json: no such file']), ('draw LOG', ['--out']),
    ('draw LOG -o tree.bmp', ['tree.bmp', '.png'])])
def test_mistakes_are_one_line_and_code_2(cli, tmp_path, args, parts):
    before = sorted(tmp_path.iterdir())
    code, out, err = cli(*[LOG if word == 'LOG' else word for word in args.split()])
    assert (code, out) == (2, '') and err.startswith('kat: ') and err.count('\n') == 1
    assert all(part in err for part in parts), err
    assert sorted(tmp_path.iterdir()) == before


def test_outside_a_clone_a_tokenizer_is_asked_for(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(kat.recipe.pipeline, 'ROOT', tmp_path)
    code, out, err = cli('stats', LOG)
    assert (code, out) == (2, '') and 'give one with --tokenizer FOLDER' in err


def test_help(cli):
    shown = dict(stats=('--tokenizer', '--model', 'kat tree stats data/'), draw=('--out', 'kat tree draw data/'))
    for command, parts in shown.items():
        code, out, err = cli(command, '--help')
        assert code == 0 and all(part in out for part in parts)

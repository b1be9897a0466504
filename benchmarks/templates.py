"""What chat templates make of twenty dialogues: every template in the installed TRL, and kat's training templates.

Writes figures/templates.json, which nbs/core/15_template_check.ipynb shows: for each template its call format, the
family whose training template fits, and one letter for each dialogue (capital: refused by the template itself).
`make templates`, ten seconds. `--check` only compares with the file. TRL's texts are read, never copied.
"""
import json
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from kat.core.template_cases import CASES
from kat.core.template_check import check_template, template_tokenizer
from kat.core.training_templates import TEMPLATE_FAMILIES, training_template

OUT = Path(__file__).parents[1] / 'figures' / 'templates.json'


def letter(verdict) -> str:
    "k keeps, d drops, c changes, m moves, u unmarked, r rewrites, i misread; F forbids"
    return {'forbids': 'F', 'misread': 'i'}.get(verdict.kind, verdict.kind[0])


def row(template: str) -> dict:
    "A template's line of the table."
    report = check_template(template_tokenizer(template))
    return dict(format=report.format, family=report.family, verdicts=''.join(map(letter, report.verdicts)))


def table() -> dict:
    "All templates."
    folder = Path(find_spec('trl').submodule_search_locations[0]) / 'chat_templates'
    own = {path.stem: row(path.read_text(encoding='utf-8')) for path in sorted(folder.glob('*.jinja'))}
    return dict(trl=version('trl'), cases=list(CASES), templates=own,
                training={family: row(training_template(family)) for family in TEMPLATE_FAMILIES})


def as_text(found: dict) -> str:
    "JSON with a template a line."
    group = lambda rows: ',\n'.join(f'  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}' for k, v in rows.items())
    return (f'{{"trl": {json.dumps(found["trl"])},\n "cases": {json.dumps(found["cases"])},\n "templates": {{\n'
            f'{group(found["templates"])}}},\n "training": {{\n{group(found["training"])}}}}}\n')


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    text = as_text(table())
    if '--check' not in sys.argv:
        OUT.write_text(text)
    elif OUT.read_text() != text:
        sys.exit(f'{OUT} is not what the installed TRL gives: run python benchmarks/templates.py')

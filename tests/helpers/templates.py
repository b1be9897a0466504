"Tokenizers for chat templates: those that trl brings, and any text of one, with the special tokens that it spells."

import re
from pathlib import Path

from kat.core.template import train_tokenizer

CORPUS = ['def add(a, b):\n    return a + b  # 12\n', 'view calc.py and fix add, then run the tests'] * 9
SPELLED = re.compile(
    r'<\|[a-zA-Z_/]+\|?>|<[a-z_]+\|>|<｜[^<>｜]+｜>|<(?:start|end)_of_turn>|'
    r'<sop>|\[gMASK\]|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS)\]'
)


def tokenizer_for(template, eos='<|endoftext|>', bos='<s>'):
    "A tokenizer whose special tokens are our own, eos, bos and those that the template spells."
    tok = train_tokenizer(CORPUS, 340)
    found = list(dict.fromkeys([*SPELLED.findall(template), eos, bos]))
    tok.add_special_tokens(dict(additional_special_tokens=found), replace_extra_special_tokens=False)
    tok.eos_token, tok.bos_token, tok.chat_template = eos, bos, template
    return tok


def trl_templates():
    "The templates of real models by name; none where trl is not installed."
    from importlib.util import find_spec

    if (spec := find_spec('trl')) is None:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / 'chat_templates'
    return {p.stem: p.read_text(encoding='utf-8') for p in sorted(folder.glob('*.jinja'))}

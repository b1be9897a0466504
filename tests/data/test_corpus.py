"Corpora: pure functions of their seed, answers that stand in their context, instructions that pass their checks"
import itertools
import random
import re

import pytest

from kat.core.template import train_tokenizer
from kat.data.corpus import (DRILLS, INSTRUCTIONS, base_documents, encode, identifiers, instruction, reasoning,
                             source_files, drill_pairs)

WORDS = 'total price count area speed level margin offset width height depth power'.split()


@pytest.mark.parametrize('drill', sorted(set(DRILLS), key=lambda d: d.__name__))
def test_drills_are_repeatable_and_learn_answers_only(drill):
    a, b = (drill(random.Random(5), WORDS) for _ in range(2))
    assert a == b and any(learn for _, learn in a)
    for (question, asked), (answer, learn) in itertools.pairwise(a):
        if learn:
            assert question.startswith('<|im_start|>user\n') and not asked and answer.endswith('<|im_end|>')


def test_answers_of_pair_drills_stand_in_the_context():
    for seed in range(30):
        doc = drill_pairs(random.Random(seed), WORDS)
        shown = re.search('<tool_response>(.*)</tool_response>', doc[0][0], re.S)[1]
        known = dict(line.split(' = ') for line in shown.splitlines())
        for (q, _), (a, learn) in itertools.pairwise(doc):
            if learn:
                assert a.removesuffix('<|im_end|>') in {*known.values(), *(f'{k} = {v}' for k, v in known.items())}


def test_base_stream_is_a_function_of_the_seed():
    texts = [' '.join(WORDS) + '\n' + 'def total(price, count):\n    return price * count\n' * 40]
    take = lambda seed: list(itertools.islice(base_documents(seed, texts), 20))
    assert take(1) == take(1) != take(2)


def test_sources_are_installed_and_missing_ones_named():
    assert len(source_files(('click',))) > 5
    with pytest.raises(ValueError, match="'no_such_package'"):
        source_files(('no_such_package',))


@pytest.mark.parametrize('name', INSTRUCTIONS)
def test_instruction_checks_can_fail(name):
    _, make, check = INSTRUCTIONS[name]
    words = ['total', 'price', 'count']
    assert check(make(words), words) and not check('Zzz, nonsense' if name != 'count' else '99', words)


def test_reasoning_is_right():
    for seed in range(50):
        for (q, _), (a, learn) in itertools.pairwise(reasoning(random.Random(seed))):
            q, a = q.removeprefix('<|im_start|>user\n').split('<|im_end|>')[0], a.removesuffix('<|im_end|>')
            if learn and '?' in q:
                assert eval(q.replace('?', a).replace('=', '=='))
            elif learn and 'f(' not in q:
                assert str(eval(q)) == a


def test_encode_cuts_and_marks():
    tok = train_tokenizer(['in capitals: total price'] * 3, 300)
    ids, mask = encode(tok, instruction(random.Random(0), WORDS), 20)
    assert len(ids) == len(mask) <= 20
    assert identifiers(['Ab a1 abc_d x']) == ['abc_d']

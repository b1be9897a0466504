"Hypothesis strategies for records and dialogues, shared by the tests of the core chapter."

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from kat.core.types import KINDS, Group, Segment, Trajectory

few = settings(max_examples=30, deadline=None)  # enough to find, quick enough for two cores
names = st.text('ab1 é☃"\\\n\t\u2028\x00𝄞', max_size=6)
finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | names
json_values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(names, scalars, max_size=2)
free = st.dictionaries(names, json_values, max_size=2)
unknown = st.dictionaries(st.sampled_from(['reviewed', 'x-new']), json_values, max_size=1)


@st.composite
def segments(draw, turn=0):
    "A valid segment, with or without log-probs, entropies and versions."
    n, trainable = draw(st.integers(0, 3)), draw(st.booleans())
    some = lambda elements: draw(st.none() | st.lists(elements, min_size=n, max_size=n))
    absent = st.nothing() if trainable else st.just(float('nan'))
    return Segment(
        draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n)),
        draw(st.sampled_from(KINDS)),
        turn,
        trainable,
        some(st.floats(-(2.0**60), 0, width=32) | absent),
        some(st.floats(0, 32, width=32) | absent),
        some(st.integers(-1, 2**31 - 1)),
        draw(st.none() | names),
        draw(unknown),
    )


@st.composite
def trajectories(draw, task=None):
    "A valid trajectory with turns in order."
    turns = np.cumsum(draw(st.lists(st.integers(0, 2), max_size=3))).tolist()
    return Trajectory(
        draw(names) if task is None else task,
        [draw(segments(t)) for t in turns],
        draw(st.none() | finite),
        draw(free),
        draw(free),
        draw(unknown),
    )


@st.composite
def groups(draw):
    "A valid group."
    task = draw(names)
    return Group(task, draw(st.lists(trajectories(task), max_size=2)), draw(free), draw(unknown))

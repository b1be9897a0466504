"""Mutation scores of a task set before and after strengthening (see `kat tasks strengthen`):

    python benchmarks/mutation.py FOLDER

Reads FOLDER/strengthened/*.json, prints the table, draws `figures/mutation.png`.
"""
import json
import sys
from pathlib import Path

from kat.core.figures import save_figure, use_style
from kat.strength.survey import ENOUGH, score_table
from kat.recipe.pipeline import ROOT


def draw(rows):
    "One line a task, from its score before to its score after"
    plt, _ = use_style()
    counted = {n: r for n, r in rows.items() if r['before']['covered'] >= ENOUGH and r['before']['score'] is not None}
    names = sorted(counted, key=lambda n: (counted[n]['before']['score'], counted[n]['after']['score'], n))
    fig, ax = plt.subplots(figsize=(6.4, 1.4 + .22 * len(names)))
    for y, name in enumerate(names):
        before, after = (counted[name][k]['score'] for k in ('before', 'after'))
        ax.plot([before, after], [y, y], color='0.75', lw=2, zorder=1)
        ax.scatter([before], [y], s=44, facecolor='white', edgecolor='C0', zorder=2, label='before' if not y else None)
        ax.scatter([after], [y], s=26, marker='D', color='C1', zorder=3, label='after' if not y else None)
    ax.set(yticks=range(len(names)), yticklabels=names, xlim=(-.02, 1.02), ylim=(-.7, len(names) - .3),
           xlabel='killed of covered mutants')
    ax.legend(loc='upper left', fontsize=8)
    ax.set_title('How well tests know a fix', loc='left')
    return fig


def main(folder):
    files = sorted(Path(folder, 'strengthened').glob('*.json'))
    if not files:
        sys.exit(f'{folder}/strengthened holds no results; `kat tasks strengthen {folder}` makes them')
    rows = {path.stem: json.loads(path.read_text(encoding='utf-8')) for path in files}
    print(score_table(rows))
    drawn = {r['before']['budget'] for r in rows.values()}
    caption = (f'Share of covered mutants of the fix that the expected tests notice, before and after strengthening; '
               f'at most {max(drawn)} mutants a task, drawn with a seed; tasks with at least {ENOUGH} covered mutants.')
    save_figure(draw(rows), ROOT/'figures/mutation.png', caption, 'python benchmarks/mutation.py FOLDER')


if __name__ == '__main__':
    main(sys.argv[1])

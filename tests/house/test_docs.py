"The site's bridge and the check for outside requests"
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT/'docs'))
import bridge  # noqa: E402
import build  # noqa: E402
import readme  # noqa: E402


def site(*pages):
    "A Site over (page, module, names shown, cells) without writing anything"
    made = bridge.Site(Path('/nonexistent'), Path('/nonexistent'))
    for page, module, names in pages:
        for name in names:
            made.add(name, module, page)
    return made


def test_names_link_to_the_page_that_documents_them():
    pages = site(('core/01_types.ipynb', 'core.types', ['Segment', 'load']),
                 ('learn/08_rl.ipynb', 'learn.rl', ['rl_loss', 'load']))
    here = 'learn/08_rl.ipynb'
    assert pages.linkify('a `Segment`', here) == 'a [`Segment`](../core/01_types.ipynb#segment)'
    assert pages.linkify('`Segment.ids`', here) == '[`Segment.ids`](../core/01_types.ipynb#segment)'
    assert pages.linkify('`rl_loss()`', here) == '[`rl_loss()`](#rl_loss)'
    assert pages.linkify('`learn.rl.load`', here) == '[`learn.rl.load`](#load)'
    for same in ('`load`', '`nothing`', '[`Segment`](x)', '# `Segment`', '```\n`Segment`\n```', '    `Segment`'):
        assert pages.linkify(same, here) == same


def test_links_are_moved_or_refused(tmp_path):
    pages = bridge.Site(Path('/nonexistent'), tmp_path)
    assert pages.markdown('[map](../index.ipynb#Map)', 'core/01_types.ipynb') == '[map](../index.ipynb#map)'
    assert pages.markdown('[terms](../LICENSE)', 'index.ipynb') == 'terms (`LICENSE`)'
    assert pages.markdown('[k](https://example.org) [a](#use)', 'index.ipynb') == '[k](https://example.org) [a](#use)'
    assert pages.markdown('[c](../CONTRIBUTING.md)', 'index.ipynb') == '[c](CONTRIBUTING.md)'
    assert (tmp_path/'CONTRIBUTING.md').exists()
    with pytest.raises(SystemExit, match='core/99_gone.ipynb, which does not exist'):
        pages.markdown('[x](core/99_gone.ipynb)', 'index.ipynb')


def test_readme_links_are_seen_from_the_root():
    md = readme.readme()
    assert '](nbs/core/01_types.ipynb)' in md and '](CONTRIBUTING.md)' in md and '](../' not in md


def test_index_maps_every_notebook():
    nbs = ROOT/'nbs'
    text = ''.join(''.join(cell['source']) for cell in json.loads((nbs/'index.ipynb').read_text())['cells'])
    pages = [path.relative_to(nbs).as_posix() for path in nbs.rglob('*.ipynb')
             if '.ipynb_checkpoints' not in path.parts]
    missing = [page for page in pages if page != 'index.ipynb' and f']({page})' not in text]
    assert not missing, 'not in the map of nbs/index.ipynb'


@pytest.mark.parametrize('html', [
    '<script src="https://x.org/a.js"></script>', '<link rel="stylesheet" href="//x.org/a.css">',
    '<img src="HTTP://x.org/a.png">', '<img srcset="a.png 1x, https://x.org/b.png 2x">',
    '<style>@import "https://x.org/a.css";</style>',
    '<div style="background: url(https://x.org/a.png)"></div>',
    '<link rel="preload" href="https://x.org/f.woff2" as="font">'])
def test_outside_requests_are_found(tmp_path, html):
    (tmp_path/'a.html').write_text(html)
    found, = build.outside(tmp_path)
    assert found.startswith('a.html: ') and '//x.org/' in found


def test_links_to_follow_are_no_requests(tmp_path):
    page = '<a href="https://x.org">x</a><link rel="canonical" href="https://x.org"><img src="a.png">'
    (tmp_path/'a.html').write_text(page)
    (tmp_path/'a.css').write_text('body { background: url("../img/a.png") }')
    assert build.outside(tmp_path) == []
    (tmp_path/'a.css').write_text('@font-face { src: url(https://x.org/f.woff2) }')
    assert build.outside(tmp_path) == ['a.css: https://x.org/f.woff2']


def test_what_could_lie_names_tests_that_exist():
    "Each row of the page names its guards"
    cells = json.loads((ROOT/'nbs/what_could_lie.ipynb').read_text())['cells']
    rows = [x for c in cells for x in ''.join(c['source']).split('\n') if x.startswith('  Guarded by ')]
    assert len(rows) > 20
    for row in rows:
        guards = re.findall(r'`([\w/]+\.py)(?:::(\w+))?`', row)
        assert guards, row
        for path, name in guards:
            assert f'def {name or "main"}(' in (ROOT/'tests'/path).read_text(), (path, name)


def library_only(folder):
    "Links to the distributions that kat without extras needs, and to nothing else"
    wanted, seen = ['kat-rl'], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen: continue
        seen.add(name)
        needs = map(Requirement, metadata.requires(name) or [])
        wanted += [need.name for need in needs if not need.marker or need.marker.evaluate({'extra': ''})]
    for name in seen - {'kat-rl'}:
        for path in metadata.files(name):
            (folder/path.parts[0]).exists() or '..' in path.parts or (folder/path.parts[0]).symlink_to(
                metadata.distribution(name).locate_file(path.parts[0]))


def test_the_tree_of_the_front_page_runs_as_printed_with_the_library_alone(tmp_path):
    example = re.search(r'## A tree.*?```python\n(.*?)```', readme.readme(), re.S)[1]
    library_only(tmp_path)
    env = dict(os.environ, PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}', PYTHONDONTWRITEBYTECODE='1')
    ran = subprocess.run([sys.executable, '-S', '-c', example], env=env, capture_output=True, text=True, timeout=300)
    assert not ran.returncode, ran.stderr
    assert re.match(r'TokenTree\(3 sequences, 15 tokens -> 8 in 5 nodes, depth 6, POR 0.47\) tensor\(', ran.stdout)
    missing = subprocess.run([sys.executable, '-S', '-c', 'import trl'], env=env, capture_output=True, text=True)
    assert "No module named 'trl'" in missing.stderr


BAD = """<title>arXiv:2511.00413</title><p>| a | b |</p><img src="x.png"><img src="y.png" alt="a curve">
<p>see arXiv:2511.00413 and <a href="z">arXiv:2511.00413</a>, <code>| c</code></p><pre>| d arXiv:2511.00413</pre>"""


def test_what_a_reader_would_stumble_over_fails_the_build(tmp_path):
    (tmp_path/'page.html').write_text(BAD)
    assert build.stumbles(tmp_path) == ["page.html: a table as text: '| a | b |'",
                                        'page.html: a picture without alt text: x.png',
                                        'page.html: a paper without a link: arXiv:2511.00413']
    assert bridge.papers('(arXiv:2511.00413), [arXiv:2511.00413](u)\n```\narXiv:2511.00413\n```') == (
        '([arXiv:2511.00413](https://arxiv.org/abs/2511.00413)), [arXiv:2511.00413](u)\n```\narXiv:2511.00413\n```')
    assert bridge.words('# Title\n\nWhat `it` shows, see\n[there](x.ipynb):') == 'What it shows, see there'


def test_a_term_is_linked_where_a_page_first_uses_it(tmp_path):
    cells = [dict(source='### Loss mask\n\nx'), dict(source='### Turn')]
    (tmp_path/'glossary.ipynb').write_text(json.dumps(dict(cells=cells)))
    terms, seen = bridge.Terms(tmp_path/'glossary.ipynb'), set()
    before, after = '# A loss mask\n`loss mask` [loss mask](x) ', ' and a loss mask in a turn'
    said = terms.link(f'{before}Loss masks{after}', 'core/01_types.ipynb', seen)
    assert said == f'{before}[Loss masks](../glossary.ipynb#loss-mask){after}'
    assert terms.link('a loss mask', 'core/01_types.ipynb', seen) == 'a loss mask'

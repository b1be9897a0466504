"""Build the site into `_docs/html`: notebooks -> nbdev -> bridge -> Sphinx

Warnings, outside requests, tables that came out as text, pictures without words and papers without a link are errors.
"""
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

from bridge import ROOT, Site
from nbdev.serve import proc_nbs

OUT = ROOT/'_docs'
_LOADS = dict(script='src', link='href', img='src', iframe='src', source='src', video='src', audio='src', embed='src',
              object='data', track='src', input='src')
_OUTSIDE = re.compile(r'\s*(https?:)?//', re.I)


class Loads(HTMLParser):
    "What a browser fetches when it shows the page: not the links that a reader may follow"
    def __init__(self):
        super().__init__()
        self.found = []
    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == 'link' and given.get('rel') in ('canonical', 'next', 'prev', 'author', 'license'): return
        urls = [given.get(_LOADS.get(tag, ''), ''), *(given.get('srcset') or '').split(',')]
        self.found += [url for url in urls if url and _OUTSIDE.match(url)] + css_loads(given.get('style') or '')
    def handle_data(self, data):
        if self.lasttag == 'style':
            self.found += css_loads(data)


def css_loads(css):
    "Outside addresses in `url(...)` and `@import`"
    urls = re.findall(r'url\(\s*["\']?([^"\')]+)|@import\s+["\']([^"\']+)', css)
    return [url for pair in urls for url in pair if url and _OUTSIDE.match(url)]


def outside(html):
    "`page: address` for everything below `html` that a page would fetch from another host"
    bad = []
    for path in sorted(html.rglob('*')):
        if path.suffix == '.html':
            page = Loads()
            page.feed(path.read_text())
            found = page.found
        elif path.suffix == '.css':
            found = css_loads(path.read_text())
        else:
            continue
        bad += [f'{path.relative_to(html)}: {url}' for url in found]
    return bad


class Shown(HTMLParser):
    "What a reader would stumble over: tables as text, pictures without words, numbers of papers that are no links"
    def __init__(self):
        super().__init__()
        self.within, self.found = [], []
    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == 'img' and not (given.get('alt') or '').strip():
            self.found.append(f'a picture without alt text: {given.get("src", "")[:80]}')
        if tag in ('pre', 'code', 'a', 'p', 'title', 'script', 'style'):
            self.within.append(tag)
    def handle_endtag(self, tag):
        if tag in self.within:
            del self.within[len(self.within) - 1 - self.within[::-1].index(tag):]
    def handle_data(self, data):
        if self.within[-1:] == ['p'] and data.startswith('| '):
            self.found.append(f'a table as text: {data[:60]!r}')
        bare = not {'pre', 'code', 'a', 'title', 'script', 'style'} & {*self.within}
        if bare and (paper := re.search(r'arXiv[: ]?\d{4}\.\d{4,5}', data)):
            self.found.append(f'a paper without a link: {paper[0]}')


def stumbles(html):
    "`page: what` for everything below `html` that `Shown` finds"
    bad = []
    for path in sorted(html.rglob('*.html')):
        page = Shown()
        page.feed(path.read_text())
        bad += [f'{path.relative_to(html)}: {what}' for what in page.found]
    return bad


def main():
    os.chdir(ROOT)
    site = Site(proc_nbs('nbs', n_workers=0, force=True).resolve(), OUT/'src')
    site.write()
    shutil.rmtree(OUT/'html', ignore_errors=True)
    sphinx = [sys.executable, '-m', 'sphinx', '-E', '-q', '-W', '--keep-going', '-c', 'docs']
    if subprocess.call([*sphinx, OUT/'src', OUT/'html']):
        sys.exit('the site has warnings (above)')
    if bad := outside(OUT/'html'):
        sys.exit('the site would fetch from other hosts:\n' + '\n'.join(bad))
    if bad := stumbles(OUT/'html'):
        sys.exit('pages of the site want mending:\n' + '\n'.join(bad))
    print(f'{len(site.nbs)} pages: {(OUT/"html"/"index.html").as_uri()}')


if __name__ == '__main__':
    main()

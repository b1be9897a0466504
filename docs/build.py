"Build the site into `_docs/html`: notebooks -> nbdev -> bridge -> Sphinx; warnings and outside requests are errors"
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
    print(f'{len(site.nbs)} pages: {(OUT/"html"/"index.html").as_uri()}')


if __name__ == '__main__':
    main()

"README.md from nbs/index.ipynb: `python docs/readme.py` writes it, `--check` only compares"
import sys
from pathlib import Path

import nbformat
from bridge import NBS, ROOT, relink
from nbconvert import MarkdownExporter


def readme():
    "The index notebook as Markdown, its links seen from the repository's root"
    nb = nbformat.read(NBS/'index.ipynb', 4)
    def place(path, fragment, _):
        return path + (f'#{fragment}' if fragment else '')
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            cell.source = relink(cell.source, 'nbs/index.ipynb', place)
    md, _ = MarkdownExporter().from_notebook_node(nb)
    return '<!-- made from nbs/index.ipynb by docs/readme.py: edit the notebook -->\n\n' + md.strip() + '\n'


if __name__ == '__main__':
    path, new = Path(ROOT/'README.md'), readme()
    if '--check' not in sys.argv:
        path.write_text(new)
    elif path.read_text() != new:
        sys.exit('README.md is not what nbs/index.ipynb gives: run python docs/readme.py')

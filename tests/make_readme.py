"Make README.md and llms.txt from the notebooks: `python tests/make_readme.py`."
import json, re
from pathlib import Path
from urllib.parse import quote
from make_pyproject import settings

root = Path(__file__).resolve().parent.parent
note = '<!-- Made from nbs/index.ipynb by `make readme`: edit that one. -->\n\n'
hidden = re.compile(r'^#\|\s*(hide|include:\s*false)\s*$', re.M)
directive = re.compile(r'^#\|.*\n?', re.M)

def text(o): return o if isinstance(o, str) else ''.join(o)

def relink(md):
    "Links that start in nbs/ as links that start at the top; code is left alone."
    def f(m): return m[0] if m['code'] else f"]({m['to'][3:] if m['to'].startswith('../') else 'nbs/' + m['to']})"
    return re.sub(r'(?P<code>```.*?```|`[^`\n]*`)|\]\((?!\w+:|#|/)(?P<to>[^)\s]+)\)', f, md, flags=re.S)

def fence(s, lang=''): return f'```{lang}\n{s.rstrip()}\n```'

def output(o):
    "One output of a code cell."
    if o['output_type'] == 'stream': return fence(text(o['text']), 'text')
    if o['output_type'] == 'error': raise ValueError(f"index.ipynb: a cell failed with {o['ename']}: {o['evalue']}")
    data = o['data']
    if 'text/markdown' in data: return relink(text(data['text/markdown'])).strip()
    if any(k.startswith('image/') for k in data): raise ValueError('index.ipynb: a picture in an output; save it under nbs/images/ and show it with ![](images/NAME.png)')
    return fence(text(data['text/plain']), 'text')

def cell(c):
    "A cell as Markdown, or '' for one that readers do not see."
    src = text(c['source'])
    if c['cell_type'] == 'markdown': return relink(src).strip()
    if c['cell_type'] != 'code' or hidden.search(src) or not src.strip(): return ''
    return '\n\n'.join([fence(directive.sub('', src), 'python'), *map(output, c['outputs'])])

def badges():
    "What GitHub shows at the top: the state of the tests, Python, licence."
    s = settings()
    picture = lambda label, value, colour: f"![{label}: {value}](https://img.shields.io/badge/{quote(label.replace('-', '--'))}-{quote(value)}-{colour})"
    tests = f"{s['git_url']}/actions/workflows/test.yml"
    return ' '.join([f'[![tests]({tests}/badge.svg)]({tests})', picture('python', f"{s['min_python']} to 3.14", 'blue'),
        f"[{picture('licence', 'Apache 2.0', 'blue')}](LICENSE)", f"[{picture('made with', 'nbdev', 'orange')}](https://nbdev.fast.ai)"])

def readme(path=root/'nbs'/'index.ipynb'):
    "The text of README.md; the badges are not in the notebook, since the site fetches nothing from elsewhere."
    first, *rest = filter(None, map(cell, json.loads(Path(path).read_text(encoding='utf-8'))['cells']))
    return note + '\n\n'.join([first, *([badges()] if Path(path) == root/'nbs'/'index.ipynb' else []), *rest]) + '\n'

def llms():
    "The text of llms.txt: what the project is and where its pages are, for language models (llmstxt.org)."
    import yaml
    first = lambda path: re.match(r'# (.*)\n\n> (.*)', text(json.loads((root/'nbs'/path).read_text(encoding='utf-8'))['cells'][0]['source']))
    site = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    _, about = first('index.ipynb').groups()
    lines = ['# mdm', '', f'> {about}', '', 'Install with `pip install -e .` in a clone; the package is called `mdm`. `from mdm.all import *` gives what a notebook needs. '
        'Each page below is a Jupyter notebook that explains and exports one module.', '', '- [README](README.md)', '- [How to contribute](CONTRIBUTING.md)', '- [Changes](CHANGELOG.md)']
    for section in (o for o in site if 'section' in o):
        lines += ['', f"## {section['section']}", '']
        for page in section['contents']:
            title, about = first(page['href']).groups()
            lines.append(f"- [{title}](nbs/{page['href']}): {about}")
    return '\n'.join(lines) + '\n'

if __name__ == '__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    (root/'llms.txt').write_text(llms(), encoding='utf-8')

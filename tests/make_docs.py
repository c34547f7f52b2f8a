"""A readable preview of the site without Quarto: `python tests/make_docs.py [FOLDER]` makes HTML pages of the notebooks, in `_docs/` unless told otherwise.

nbdev's own processors read the directives (`#| hide` and the like); where its site would show the signature of an exported cell, the pages show a table of its parameters with the source folded under it.
Pages need nothing from elsewhere: formulas are drawn by matplotlib as SVG, pictures are inside.
"""
import ast, html, io, os, posixpath, re, shutil, sys, tokenize
from functools import lru_cache
from itertools import groupby
from pathlib import Path
import yaml
from execnb.nbio import mk_cell, read_nb
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from matplotlib.textpath import TextPath
from nbconvert.filters import ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev import processors as nbdev
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc, _nbpath2html
from nbdev.process import NBProcessor
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from make_readme import text

root = Path(__file__).resolve().parent.parent
parts = ('CONTRIBUTING.md', 'CHANGELOG.md', 'LICENSE')      # files at the top that become pages, too

# ---- formulas

_one = r'\s*(?!\s*{)(\\[a-zA-Z]+|\w)'        # an argument without braces
_spelling = [(r'\\text\{([^{}]*)\}', lambda m: '\\mathrm{' + m[1].replace(' ', '\\ ') + '}'), (r'\\texttt(?![a-z])', r'\\mathtt')] + [(a, b) for a, b in (o.split(' -> ') for o in r"""\\begin\{cases\}(.*?)\\end\{cases\} -> \\left\\{\\substack{\1}\\right.
\\tfrac -> \\frac
\\([bB]igg?)[lr]?(?![a-z]) -> 
\\le(?![a-z]) -> \\leq
\\ge(?![a-z]) -> \\geq
\\[lr]Vert -> \\|
\\[lr]vert -> |
\\! -> 
\\(text|operatorname)(?![a-z]) -> \\mathrm
\\dots(?![a-z]) -> \\ldots
& -> \\quad """.splitlines())] + [(rf'\\(d?)frac{_one}', r'\\\1frac{\2}'), (rf'\\(d?)frac(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}){_one}', r'\\\1frac\2{\3}'), (rf'\\(sqrt|mathcal|mathbb|mathbf){_one}', r'\\\1{\2}')]   # what matplotlib spells otherwise

_font, _math = FontProperties(math_fontfamily='cm'), MathTextParser('path')
_letters = {1: 'M', 2: 'L', 3: 'Q', 4: 'C', 79: 'Z'}

@lru_cache(None)
def formula(tex, block=False):
    "LaTeX as an SVG in the colour of the text; as code where matplotlib does not know it."
    known = ' '.join(tex.split()).replace(*(('\\frac', '\\dfrac') if block else ('', '')))
    for a, b in _spelling: known = re.sub(a, b, known)
    try:
        w, h, depth = map(float, _math.parse(f'${known}$', 72, FontProperties(size=100, math_fontfamily='cm'))[:3])
        path = TextPath((0, 0), f'${known}$', size=100, prop=_font)
    except ValueError: return f'<code class="tex">{html.escape(tex)}</code>'
    pen = lambda v, code: _letters[int(code)] + ('' if code == 79 else ' '.join(f'{o:.0f}' for x, y in v.reshape(-1, 2) for o in (x, h - depth - y)))
    d = ''.join(pen(v, c) for v, c in path.iter_segments(simplify=False))
    return (f'<svg class="math {"block" if block else "inline"}" role="img" aria-label="{html.escape(tex)}" viewBox="0 0 {w:.0f} {h:.0f}" '
            f'style="width:{w/100:.2f}em;height:{h/100:.2f}em;vertical-align:{-depth/100:.2f}em"><path d="{d}"/></svg>')

# ---- Markdown

def slug(text):
    "The anchor of a heading, as Pandoc makes it."
    return re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', html.unescape(re.sub(r'<[^>]+>', '', text)).lower()).strip())

class Renderer(IPythonRenderer):
    "Markdown with drawn formulas and quiet anchors."
    def heading(self, text, level, **attrs):
        n = slug(text)
        return f'<h{level} id="{n}">{text}<a class="anchor" href="#{n}" aria-label="link to this section">#</a></h{level}>\n'
    def block_math(self, body): return f'<span class="display">{formula(body, True)}</span>'
    def inline_math(self, body): return formula(body)

def markdown(source): return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)
def inline(text): return re.sub(r'^<p>|</p>\s*$', '', markdown(text).strip())
def python(source): return highlight(source, PythonLexer(), HtmlFormatter())

# ---- what a cell exports

def comments(source):
    "Line number -> comment on it."
    return {t.start[0]: t.string.lstrip('# ').strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}

def arguments(node, said):
    "(name, type, default, comment) of each parameter, and of the result."
    a, text = node.args, lambda o: '' if o is None else o.value if isinstance(o, ast.Constant) and isinstance(o.value, str) and not o in node.args.defaults + node.args.kw_defaults else ast.unparse(o)
    plain = [*a.posonlyargs, *a.args]
    pairs = [*zip(plain, [None]*(len(plain) - len(a.defaults)) + a.defaults), *([(a.vararg, None)] if a.vararg else []), *zip(a.kwonlyargs, a.kw_defaults), *([(a.kwarg, None)] if a.kwarg else [])]
    owner = {(d or o).end_lineno: o for o, d in pairs} | ({node.returns.end_lineno: node.returns} if node.returns else {})   # a comment belongs to what stands last on its line
    rows = [('*'*((o is a.vararg) + 2*(o is a.kwarg)) + o.arg, text(o.annotation), text(d), said.get(n, '') if owner[n := (d or o).end_lineno] is o else '') for o, d in pairs if o.arg not in ('self', 'cls')]
    return rows + ([('returns', text(node.returns), '', said.get(node.returns.end_lineno, ''))] if node.returns else [])

def members(node, said):
    "The same of each field of a dataclass or named tuple."
    made = lambda s: {'list': '[]', 'dict': '{}'}.get(s, s + '()')
    value = lambda o: re.sub(r'^field\(default_factory=(\w+)\)$', lambda m: made(m[1]), ast.unparse(o)) if o else ''
    return [(ast.unparse(o.target), ast.unparse(o.annotation), value(o.value), said.get(o.end_lineno, '')) for o in node.body if isinstance(o, ast.AnnAssign)]

def table(rows):
    "Parameters, aligned; columns that would be empty are left out."
    if not any(r[3] for r in rows): return ''
    code = lambda s: f'<code>{html.escape(s)}</code>' if s else ''
    keep = [True, any(r[1] for r in rows), any(r[2] for r in rows), True]
    line = lambda cells, tag: '<tr>' + ''.join(f'<{tag}>{c}</{tag}>' for c, k in zip(cells, keep) if k) + '</tr>'
    return '<table class="params">' + line(('', 'type', 'default', ''), 'th') + ''.join(line(('<em>returns</em>' if n == 'returns' else code(n), code(t), code(d), inline(c)), 'td') for n, t, d, c in rows) + '</table>'

def owner(node):
    "'Class.' for a method that `@patch` adds to a class, else ''."
    if not any(ast.unparse(o).startswith('patch') for o in getattr(node, 'decorator_list', [])) or isinstance(node, ast.ClassDef): return ''
    return f'{ast.unparse(node.args.args[0].annotation)}.'

def described(node, said, prefix='', level=3):
    "Heading, docstring and parameters of a function or class, then of a class' methods."
    prefix, level = (prefix, level) if prefix or not owner(node) else (owner(node), 4)
    name, doc, is_class = prefix + node.name, ast.get_docstring(node) or '', isinstance(node, ast.ClassDef)
    methods = [o for o in node.body if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))] if is_class else []
    init = next((o for o in methods if o.name == '__init__'), None)
    rows = (arguments(init, said) if init else members(node, said)) if is_class else arguments(node, said)
    kind = 'class ' if is_class else ''
    out = f'<h{level} id="{slug(name)}" class="api"><small>{kind}</small><code>{name}</code><a class="anchor" href="#{slug(name)}" aria-label="link to {name}">#</a></h{level}>'
    shown = [o for o in methods if ast.get_docstring(o) and (o.name[0] != '_' or o.name == '__call__')]
    return out + (markdown(doc) if doc else '') + table(rows) + ''.join(described(o, said, f'{name}.', 4) for o in shown)

def definitions(tree): return [o for o in tree.body if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and (o.name[0] != '_' or o.name == '__call__' and owner(o))]
def anchors(tree, prefix=''): return [n for o in tree.body if hasattr(o, 'name') for n in (slug((prefix or owner(o)) + o.name), *(anchors(o, f'{prefix}{o.name}.') if isinstance(o, ast.ClassDef) else []))]
def is_imports(tree): return all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in tree.body)
def fold(summary, source): return f'<details class="source"><summary>{summary}</summary>{python(source)}</details>'

def exported(source):
    "The HTML of an exported cell: its documentation and its folded source; what defines nothing public is shown as it is."
    tree, source = ast.parse(source), re.sub(r'^#\|.*\n', '', source, flags=re.M).strip()
    if is_imports(tree): return fold('imports', source)
    said, found = comments(source), definitions(ast.parse(source))
    body = '<section class="api">' + ''.join(described(o, said) for o in found) + fold('source', source) + '</section>' if found else f'<div class="code">{python(source)}</div>'
    inner = [o for o in anchors(tree) if f'id="{o}"' not in body]
    return ''.join(f'<span id="{o}"></span>' for o in inner) + body

# ---- notebooks

class show_exports(nbdev.Processor):
    "Documentation in place of exported cells, nothing in place of plumbing."
    def cell(self, cell):
        d = cell.directives_ if cell.cell_type == 'code' else {}
        if d.keys() & {'export', 'exports'}: cell.shown = exported(cell.source)
        elif d.keys() & {'default_exp', 'exporti'} or d.get('include:') == ['false'] or cell.cell_type == 'code' and re.match(r'show_doc\(|.*nbdev_export\(\)', cell.source): cell.source = None

class Filter(nbdev.FilterDefaults):
    "nbdev's way of reading a notebook, less what runs code."
    def base_procs(self):
        n = nbdev
        return [FrontmatterProc, n.populate_language, n.hide_, n.strip_ansi, n.hide_line, n.filter_stream_, n.rm_header_dash, show_exports, n.clean_magics, n.add_links, n.strip_hidden_metadata]

def with_title_alone(nb):
    "nbdev takes the whole cell of the title as front matter; what else stands in it gets a cell of its own."
    title, prose = re.match(r'(# .*\n\s*> .*)\n?([\s\S]*)', nb.cells[0].source).groups()
    nb.cells[:1] = [mk_cell(title, 'markdown')] + [mk_cell(prose, 'markdown')]*bool(prose.strip())
    return nb

def output(o):
    "One output of a code cell: the richest form that a page without a running Python can show."
    if o['output_type'] == 'error': return f"<pre class='error'>{html.escape(o['ename'])}: {ansi2html(text(o['evalue']))}</pre>"
    pre = lambda s: f"<pre{' class=columns' if re.search(r'[^ ] {3,}[^ ]', s) else ''}>{ansi2html(s)}</pre>"      # what is set in columns scrolls, all else wraps
    if o['output_type'] == 'stream': return pre(text(o['text']))
    data = {k: text(v) if isinstance(v, (str, list)) else '' for k, v in o['data'].items()}
    alt = html.escape(data.get('text/plain', 'output'))
    if 'text/html' in data: return f"<div class='rich'>{data['text/html']}</div>"
    if svg := data.get('image/svg+xml'): return svg
    for kind in ('image/png', 'image/jpeg', 'image/gif'):
        if kind in data: return f"<img class='{'pixels' if 'PIL' in alt else 'plot'}' alt=\"{alt}\" src='data:{kind};base64,{''.join(data[kind].split())}'>"
    if 'text/markdown' in data: return markdown(data['text/markdown'])
    return pre(data.get('text/plain', ''))

def merged(outs):
    "Printed pieces that follow each other on the same stream, as one."
    for _, group in groupby(enumerate(outs), lambda o: o[1].get('name', o[0])):
        group = [o for _, o in group]
        yield group[0] if len(group) == 1 else dict(group[0], text=''.join(text(o['text']) for o in group))

def cell_html(cell):
    "A cell of a processed notebook."
    if cell.cell_type == 'raw': return ''
    if cell.cell_type == 'markdown': return markdown(cell.source)
    option = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*?)\s*$', cell.source, re.M))
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    code = getattr(cell, 'shown', None) or (fold('code', source) if option.get('code-fold') == 'true' else f'<div class="code">{python(source)}</div>' if source else '')
    outs = '' if option.get('output') == 'false' else ''.join(map(output, merged(cell.get('outputs', []))))
    return ('' if option.get('echo') == 'false' else code) + (f'<div class="output">{outs}</div>' if outs else '')

# ---- pages

def flat(items, section=''):
    "The sidebar of _quarto.yml in one row: (section, text, notebook)."
    for o in items:
        if 'contents' in o: yield from flat(o['contents'], o['section'])
        else: yield section, o['text'], o['href']

def page_of(name):
    "notebook or other file, relative to nbs/ -> its page, as nbdev names it"
    if name.startswith('../'): return Path(name).stem.lower() + '.html'
    return _nbpath2html(Path(name)).as_posix()

class Site:
    "All pages, and the links between them."
    def __init__(self, out):
        quarto = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
        self.out, self.menu, self.config = Path(out), list(flat(quarto['website']['sidebar']['contents'])), get_config(path=root)
        self.pages = {o: page_of(o) for _, _, o in self.menu} | {f'../{o}': page_of(f'../{o}') for o in parts}
        self.home, self.files = f'{self.config.doc_host}{self.config.doc_baseurl}/', {}

    def relink(self, url, name):
        "A link in the file `name` (relative to nbs/) as a link in its page."
        page = self.pages[name]
        to = lambda target: posixpath.relpath(target, posixpath.dirname(page) or '.')
        if url.startswith(self.home): return to(url[len(self.home):])
        if re.match(r'\w+:|#|/', url): return url
        path, _, anchor = url.partition('#')
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        target = self.pages.get(path)
        if not target and (file := (root/'nbs'/path)).is_file(): target = self.files.setdefault(file.resolve(), re.sub(r'^(\.\./)+', 'files/', path))
        return (to(target) if target else url) + ('#' + anchor if anchor else '')

    def sidebar(self, name):
        rows, last = [], ''
        for section, label, o in self.menu:
            if section != last: rows.append(f'<h2>{html.escape(section)}</h2>'); last = section
            here = ' aria-current="page"' if o == name else ''
            rows.append(f'<a href="{html.escape(o if not here else "#")}"{here} data-from="nbs">{html.escape(label)}</a>')
        return ''.join(rows)

    def write(self, name, title, description, body):
        "Wrap a body into a page."
        page, order = self.pages[name], [o for _, _, o in self.menu]
        up = '../'*page.count('/')
        rooted = lambda url: up + self.pages[url]
        side = re.sub(r'href="([^"#]+)"([^>]*) data-from="nbs"', lambda m: f'href="{rooted(html.unescape(m[1]))}"{m[2]}', self.sidebar(name)).replace(' data-from="nbs"', '')
        i, labels = order.index(name) if name in order else None, {o: t for _, t, o in self.menu}
        step = lambda j, cls: f'<a class="{cls}" href="{rooted(order[j])}">{html.escape(labels[order[j]])}</a>' if i is not None and 0 <= j < len(order) else '<span></span>'
        body = re.sub(r'(href|src)=(["\'])([^"\']*)\2', lambda m: f'{m[1]}={m[2]}{html.escape(self.relink(html.unescape(m[3]), name), False)}{m[2]}' if not m[3].startswith('data:') else m[0], body)
        body = re.sub(r'(<table.*?</table>)', r'<div class="scroll">\1</div>', body, flags=re.S)
        toc = ''.join(f'<a class="h{n}" href="#{k}">{re.sub("<a .*?</a>|<small>.*?</small>", "", t)}</a>' for n, k, t in re.findall(r'<h([23]) id="([^"]+)"[^>]*>(.*?)</h[23]>', body, re.S))
        folds = '<button type="button" id="folds">open all sources</button>' if 'class="source"' in body else ''
        (self.out/page).parent.mkdir(parents=True, exist_ok=True)
        (self.out/page).write_text(template.format(title=html.escape(title), site=html.escape(self.config.title), up=up, side=side, toc=toc and f'<p>On this page</p>{toc}', folds=folds, body=body,
            head=f'<h1>{inline(title)}</h1>' + (f'<p class="lead">{inline(description)}</p>' if description else ''), before=step((i or 0) - 1, 'before'), after=step((i or 0) + 1, 'after')), encoding='utf-8')

    def build(self):
        "Make every page; returns the folder."
        shutil.rmtree(self.out, ignore_errors=True)
        for name in (o for o in self.pages if o.endswith('.ipynb')):
            nb = with_title_alone(read_nb(root/'nbs'/name))
            Filter()(nb)
            self.write(name, nb.frontmatter_['title'], nb.frontmatter_.get('description', ''), '\n'.join(map(cell_html, nb.cells)))
        for name in parts:
            source = (root/name).read_text(encoding='utf-8')
            title = re.match(r'# (.*)', source)
            self.write(f'../{name}', title[1] if title else Path(name).stem.title(), '', markdown(source[title.end():]) if title else f'<pre>{html.escape(source)}</pre>')
        if (root/'nbs'/'images').is_dir(): shutil.copytree(root/'nbs'/'images', self.out/'images')
        for file, target in self.files.items():
            (self.out/target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, self.out/target)
        day, night = (HtmlFormatter(style=o).get_style_defs('.highlight') for o in ('default', 'github-dark'))
        (self.out/'docs.css').write_text((root/'tests'/'docs.css').read_text(encoding='utf-8') + day + '\n@media (prefers-color-scheme: dark) {\n' + night + '\n}\n', encoding='utf-8')
        return self.out

template = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - {site}</title><link rel="stylesheet" href="{up}docs.css"></head>
<body><nav class="side"><details><summary><b>{site}</b><span>contents</span></summary><div>{side}</div></details></nav>
<main>{head}{folds}
{body}
<nav class="steps">{before}{after}</nav></main>
<nav class="toc">{toc}</nav>
<script>
const menu = document.querySelector('.side details'), wide = matchMedia('(min-width: 60rem)'), fit = () => menu.open = wide.matches
fit(); wide.addEventListener('change', fit)
document.getElementById('folds')?.addEventListener('click', e => {{
  const all = document.querySelectorAll('details.source'), open = ![...all].every(o => o.open)
  all.forEach(o => o.open = open); e.target.textContent = open ? 'close all sources' : 'open all sources' }})
</script></body></html>
"""

def build(out=root/'_docs'):
    "The preview of the site, in the folder `out`, which is replaced."
    os.chdir(root)                                   # where nbdev looks for its settings
    return Site(out).build()

if __name__ == '__main__': print(build(*map(lambda o: Path(o).resolve(), sys.argv[1:2]))/'index.html')

"The site: the preview that `make docs` makes without Quarto, and what nbdev asks of the notebooks to make the real one."
import ast, json, os, re, subprocess, sys
from collections import defaultdict
from html.parser import HTMLParser
from posixpath import dirname, join, normpath
from urllib.parse import unquote
import pytest
from make_docs import Site, build, exported, formula, slug
from make_readme import root, text

class Page(HTMLParser):
    "Anchors, links, and what a browser would fetch."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.words, self.place = set(), [], [], defaultdict(str), None
        self.html = path.read_text(encoding='utf-8')
        self.feed(self.html)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag == 'a' and 'href' in attrs: self.links.append(attrs['href'])
        if tag == 'link' or tag in ('img', 'script', 'video', 'source', 'iframe') and 'src' in attrs: self.fetched.append(attrs.get('src') or attrs['href'])
        self.place = tag if tag == 'h1' else 'lead' if attrs.get('class') == 'lead' else self.place
    def handle_endtag(self, tag): self.place = None if tag in ('h1', 'p') else self.place
    def handle_data(self, data): self.words[self.place] += data

@pytest.fixture(scope='module')
def site(tmp_path_factory): return build(tmp_path_factory.mktemp('site')/'docs')

@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob('*.html') if 'files' not in p.relative_to(site).parts}

notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts))
def report(problems, rule): assert not problems, '\n  '.join([f'{rule}. {len(problems)} found:', *problems])
def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def page_names(): return {k: v for k, v in Site('nowhere').pages.items() if k.endswith('.ipynb')}

def test_every_notebook_is_a_page(pages):
    missing = [p.name for p in notebooks if page_names().get(p.relative_to(root/'nbs').as_posix()) not in pages]
    report(missing, 'A notebook has its page')
    report([k for k in page_names().values() if not pages[k].words['h1'].strip() or not pages[k].words['lead'].strip()], 'A page has a title and a description')

def broken(name, page, pages, site):
    for link in page.links + page.fetched:
        if re.match(r'\w+:', link): continue
        path, _, anchor = unquote(link).partition('#')
        target = normpath(join(dirname(name), path)) if path else name
        if not (site/target).is_file(): yield f'{name}: {link}'
        elif anchor and anchor not in pages[target].ids: yield f'{name}: {link} (no such anchor)'

def test_no_link_is_broken(site, pages): report([o for k, p in pages.items() for o in broken(k, p, pages, site)], 'A link leads somewhere')
def test_the_check_for_links_finds_them(site, pages):
    page = pages['index.html']
    page.links += ['nowhere.html', 'schedule.html#nothing', '#nothing']
    assert len(list(broken('index.html', page, pages, site))) == 3
    del page.links[-3:]

def test_pages_need_no_network(pages): report([f'{k}: {o[:80]}' for k, p in pages.items() for o in p.fetched if re.match('(https?:)?//', o)], 'A page fetches nothing from elsewhere')
def test_every_formula_is_drawn(pages): report([f'{k}: {o}' for k, p in pages.items() for o in re.findall('<code class="tex">(.*?)</code>', p.html)], 'matplotlib knows every formula')
def test_plumbing_stays_out(pages): report([f'{k}: {o}' for k, p in pages.items() for o in re.findall(r'^#\|.*|nbdev_export\(\)|default_exp', re.sub('<[^>]+>', '', p.html), re.M) if k not in ('contributing.html', 'changelog.html')], 'Directives are obeyed, not shown')

def public(module):
    "Functions and classes that a module exports."
    tree = ast.parse(module.read_text(encoding='utf-8'))
    listed = next((ast.literal_eval(o.value) for o in tree.body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__'), [])
    return [o.name for o in tree.body if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and o.name in listed]

def test_every_exported_name_is_on_its_page(pages):
    of = {re.sub(r'.*#\| *default_exp +([\w.]+).*', r'\1', s, flags=re.S): nb for nb in notebooks if 'default_exp' in (s := '\n'.join(text(c['source']) for c in cells(nb) if c['cell_type'] == 'code'))}
    page = {m: page_names().get(nb.relative_to(root/'nbs').as_posix()) for m, nb in of.items()}
    dotted = lambda m: '.'.join(m.relative_to(root/'mdm').with_suffix('').parts)
    names = [(page[dotted(m)], o) for m in sorted((root/'mdm').rglob('*.py')) if page.get(dotted(m)) for o in public(m)]
    assert len(names) > 250
    report([f'{page}: {o}' for page, o in names if slug(o) not in pages[page].ids], 'What a module exports has its heading')
    described = lambda html, o: re.search(rf'<h3 id="{re.escape(slug(o))}" class="api">.*?</h3>\s*<p>\s*\S', html)
    report([f'{page}: {o}' for page, o in names if not described(pages[page].html, o)], 'Under the heading stands what it is')

def test_parameters_are_shown():
    got = exported('#| export\ndef f(\n    x:list[int], # first\n    *,\n    y:str=\'a # b\', # second & last\n)->bool: # whether\n    "What `f` does."\n    return x # no docment\n')
    for o in ('<code>f</code>', 'What <code>f</code> does.', '<code>list[int]</code>', '<td>first</td>', 'a # b', '<td>second &amp; last</td>', '<em>returns</em>', '<td>whether</td>'): assert o in got, o
    assert '<td>no docment</td>' not in got
    got = exported('@dataclass\nclass A:\n    "An a."\n    b: list = field(default_factory=list) # items\n    def c(self): "Says c."\n    def _d(self): "Hidden."\n')
    for o in ('id="a"', '<td>items</td>', '<code>[]</code>', 'id="a.c"', 'Says c.'): assert o in got, o
    assert '<p>Hidden' not in got and 'imports' in exported('import os\nfrom re import sub')

def test_formulas():
    for tex in (r'\sqrt\gamma\,\tfrac12', r'\frac1{1-e^{-\eta}}', r'\big\|x\big\|\le\lVert y\rVert', r'\begin{cases}a&b\\c&d\end{cases}'): assert '<svg' in formula(tex), tex
    assert 'class="tex"' in formula(r'\nosuchthing')

def test_title_cells_hold_nothing_else():
    report([p.name for p in notebooks if not re.fullmatch(r'# .+\n+> .+\s*', text(cells(p)[0]['source']))], 'nbdev takes the whole first cell as front matter: title and description stand alone in it')

process = '''
import os, sys, warnings; warnings.simplefilter('ignore'); os.environ['IN_TEST'] = '1'
import multiprocessing, mdm.all
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
def one(path):
    try: FilterDefaults()(read_nb(path))
    except BaseException as e: sys.__stdout__.write(f'{os.path.basename(path)}: {e!r} from {e.__cause__!r}'.replace('\\n', ' ')[:400] + '\\n'); sys.__stdout__.flush()
for path in sys.argv[1:]:            # a process of its own for each, as nothing of one notebook may reach the next
    p = multiprocessing.get_context('fork').Process(target=one, args=(path,)); p.start(); p.join()
'''

def test_nbdev_can_process_every_notebook(tmp_path):
    "What `nbdev_docs` does before it calls Quarto: run imports and exported cells, and ask for the documentation."
    done = subprocess.run([sys.executable, '-c', process, *map(str, notebooks)], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr
    rule = 'nbdev runs every cell with an import when it makes the site, so imports stand in cells of their own'
    report(done.stdout.splitlines(), rule); report([p.name for p in tmp_path.iterdir()], f'{rule}, and write nothing')

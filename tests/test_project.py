"What holds for the project as a whole: notebooks, modules, README and packaging agree, and the house rules are kept."
import ast, importlib, inspect, json, multiprocessing, os, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
import pytest, yaml
from fastcore.docments import docments
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from make_pyproject import pyproject
from make_readme import llms, readme, root, text

config = ConfigParser(delimiters=['='], interpolation=None)
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(root).parts))
modules = sorted(p for p in (root/'mdm').rglob('*.py') if p.stem[0] != '_')

def name(nb): return nb.relative_to(root/'nbs').as_posix()
def dotted(module): return '.'.join(module.relative_to(root/'mdm').with_suffix('').parts)
def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def report(problems, rule): assert not problems, '\n  '.join([f'{rule}. {len(problems)} found:', *problems])
def run(*args, cwd=root, env={}):
    "Run a command of this Python's environment; returns what it printed."
    bin, clean = Path(sys.executable).parent, {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    done = subprocess.run([bin/args[0], *args[1:]], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, args))}\n{done.stdout}\n{done.stderr}"
    return done.stdout
def python(code): return run(Path(sys.executable).name, '-W', 'ignore', '-c', code)

def sources(nb):
    "The code of a notebook as syntax trees, less the lines that are not Python."
    for c in cells(nb):
        if c['cell_type'] != 'code' or (src := text(c['source'])).startswith('%%'): continue
        yield ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', src, flags=re.M))

def exported(nb):
    "Name of the module that a notebook becomes, or None."
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(text(c['source']) for c in cells(nb)), re.M)
    return found and found[1]

def imports(tree):
    "Pairs (top-level package, module inside it) of all imports; relative ones count as mdm."
    known = {dotted(o) for o in modules}
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            for a in o.names: yield (*a.name.split('.', 1), '')[:2]
        elif isinstance(o, ast.ImportFrom):
            package, _, module = ('mdm.' * bool(o.level) + (o.module or '')).rstrip('.').partition('.')
            inside = [f'{module}.{a.name}'.lstrip('.') for a in o.names]
            yield from ((package, m) for m in ([m for m in inside if m in known] or [module])) if package == 'mdm' else [(package, module)]

# ---- notebooks and what is made from them

@pytest.fixture(scope='module')
def remade(tmp_path_factory):
    "A copy of the project with `mdm/` exported anew from cleaned notebooks."
    copy = tmp_path_factory.mktemp('project')/'mdm'
    shutil.copytree(root/'nbs', copy/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.*'))
    shutil.copytree(root/'mdm', copy/'mdm', ignore=shutil.ignore_patterns('__pycache__', '*.py'))
    for f in ('settings.ini', 'pyproject.toml', '_quarto.yml'): shutil.copy2(root/f, copy/f)
    run('nbdev_export', cwd=copy)
    run('nbdev_clean', cwd=copy)
    return copy

def differing(a, b, pattern):
    files = {p.relative_to(d).as_posix() for d in (a, b) for p in d.rglob(pattern) if not any(o[0] == '.' for o in p.relative_to(d).parts)}
    same = lambda f: (a/f).is_file() and (b/f).is_file() and (a/f).read_bytes() == (b/f).read_bytes()
    return sorted(f for f in files if not same(f))

def test_modules_are_what_the_notebooks_export(remade):
    report(differing(root/'mdm', remade/'mdm', '*.py'), 'These modules and their notebooks differ; run `make export`')
    assert (remade/'pyproject.toml').read_text() == (root/'pyproject.toml').read_text()

def test_pyproject_is_settings(): assert (root/'pyproject.toml').read_text(encoding='utf-8') == pyproject(), 'pyproject.toml and settings.ini differ; run `make export`'
def test_llms_txt_lists_the_notebooks(): assert (root/'llms.txt').read_text(encoding='utf-8') == llms(), 'llms.txt and the notebooks differ; run `make readme`'

def test_notebooks_are_clean(remade):
    report(differing(root/'nbs', remade/'nbs', '*.ipynb'), 'These notebooks are not clean; run `make export`')

def test_readme_is_index(): assert (root/'README.md').read_text(encoding='utf-8') == readme(), 'README.md and nbs/index.ipynb differ; run `make readme`'

def test_readme_links_lead_somewhere():
    links = re.findall(r'\]\((?!\w+:|#)([^)\s#]+)', re.sub(r'```.*?```', '', readme(), flags=re.S))
    report([o for o in links if not (root/o).exists()], 'Links of README.md that lead nowhere')

def blocks(lang): return re.findall(rf'^```{lang}\n(.*?)^```', readme(), flags=re.S | re.M)

def test_readme_python_finds_what_it_imports():
    for tree in map(ast.parse, blocks('python')):
        for o in ast.walk(tree):
            if isinstance(o, ast.ImportFrom): assert all(a.name == '*' or hasattr(importlib.import_module(o.module), a.name) for a in o.names), ast.unparse(o)

def test_readme_commands_are_understood():
    lines = [o.split('#')[0].split() for b in blocks('sh') for o in b.replace('\\\n', ' ').splitlines()]
    targets = re.findall(r'^(\w+):', (root/'Makefile').read_text(), re.M)
    for command, *args in filter(None, lines):
        if command == 'make': assert set(args) <= set(targets), args
        elif command.startswith('mdm_'):
            assert f'{command}=mdm.' in settings['console_scripts'], command
            if flags := {o.split('=')[0] for o in args if o.startswith('-')}:
                known = run(command, *args[:1]*(command == 'mdm_dataset'), '--help')
                assert all(re.search(rf'(?<![\w-]){o}\b', known) for o in flags), f'{command} does not know all of {sorted(flags)}'

def test_notebooks_are_run_apart_and_failures_are_told(tmp_path):
    "By `run_notebooks.py`, as `make test` does; a notebook that kills its process fails like one that raises."
    import run_notebooks
    for o in run_notebooks.packages: importlib.import_module(o)
    def nb(name, source): (tmp_path/name).write_text(json.dumps(dict(cells=[dict(cell_type='code', source=source, outputs=[], metadata={}, execution_count=None, id='a')], metadata={}, nbformat=4, nbformat_minor=5)))
    nb('1.ipynb', 'import torch, os, tempfile\ntorch.manual_seed(1); torch.mark = 1; os.environ["MARK"] = "1"; d = tempfile.mkdtemp(); open("folder.txt", "w").write(d)')
    nb('2.ipynb', 'import sys, os, torch\nassert not hasattr(torch, "mark") and "MARK" not in os.environ and "mdm" not in sys.modules and not any(o.endswith("tests") for o in sys.path)\nimport multiprocessing; assert multiprocessing.get_start_method() == "METHOD"'.replace('METHOD', multiprocessing.get_start_method()))
    nb('3.ipynb', 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
    nb('4.ipynb', 'assert 1 == 2, "not so"')
    done = subprocess.run([sys.executable, root/'tests'/'run_notebooks.py', *sorted(tmp_path.glob('*.ipynb'))], cwd=root, capture_output=True, text=True)
    told = done.stdout
    assert done.returncode == 1 and '2 of 4 notebooks ran' in told, told + done.stderr
    for name, end in [('1', 'passed'), ('2', 'passed'), ('3', r'FAILED \(exit status -9\)'), ('4', r'FAILED \(exit status 1\)')]: assert re.search(rf'{name}\.ipynb: {end}', told), told
    assert 'not so' in done.stderr and not Path((tmp_path/'folder.txt').read_text()).exists()

def test_readme_maker(tmp_path):
    def nb(*cells):
        (tmp_path/'n.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type=t, source=s, outputs=o) for t, s, o in cells])))
        return readme(tmp_path/'n.ipynb').split('-->\n\n')[1]
    data = lambda **kw: [dict(output_type='execute_result', data={k.replace('_', '/'): v for k, v in kw.items()})]
    assert nb(('markdown', '# T\n\n> d', [])) == '# T\n\n> d\n'
    assert nb(('markdown', '[a](01.ipynb) ![](images/p.png) [l](../LICENSE) [w](https://x.org) [h](#h) `[c](d)`', [])) == \
        '[a](nbs/01.ipynb) ![](nbs/images/p.png) [l](LICENSE) [w](https://x.org) [h](#h) `[c](d)`\n'
    assert nb(('code', '#| hide\nx', []), ('code', 'y', [])) == '```python\ny\n```\n'
    assert nb(('code', '#| eval: false\ny', [dict(output_type='stream', text=['a\n', 'b\n'])])) == '```python\ny\n```\n\n```text\na\nb\n```\n'
    assert nb(('code', 'y', data(text_plain='P', text_markdown='*m*'))) == '```python\ny\n```\n\n*m*\n'
    assert nb(('code', 'y', data(text_plain=['4', '2']))) == '```python\ny\n```\n\n```text\n42\n```\n'
    with pytest.raises(ValueError, match='nbs/images'): nb(('code', 'y', data(image_png='', text_plain='')))
    with pytest.raises(ValueError, match='KeyError'): nb(('code', 'y', [dict(output_type='error', ename='KeyError', evalue='k')]))

def test_notebooks_have_title_and_description():
    first = {name(o): text(cells(o)[0]['source']) for o in notebooks}
    report([k for k, v in first.items() if not re.match(r'# \S.*\n\n> \S', v)], 'A notebook starts with "# Title" and "> description"')

def test_notebooks_are_small():
    report([f'{name(o)}: {o.stat().st_size/1000:.0f} kB' for o in notebooks if o.stat().st_size > 400_000], 'A notebook stays below 400 kB')

def test_notebooks_were_run():
    report([name(o) for o in notebooks if not any(c.get('outputs') for c in cells(o))], 'Every notebook shows what its code gives')
    bad = [f"{name(o)}: {out['ename']}: {out['evalue']}" for o in notebooks for c in cells(o) for out in c.get('outputs', []) if out['output_type'] == 'error']
    report(bad, 'No notebook ends in an error')

def test_site_lists_every_notebook_in_order():
    site = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    assert (root/'nbs'/'_quarto.yml').is_symlink() and (root/'nbs'/'_quarto.yml').resolve() == root/'_quarto.yml'
    flat = lambda items: chain.from_iterable(flat(o['contents']) if 'contents' in o else [(o['href'], o['text'])] for o in items)
    listed = dict(flat(site['website']['sidebar']['contents']))
    assert sorted(listed) == sorted(map(name, notebooks))
    for section in site['website']['sidebar']['contents']:
        if 'section' in section and section['section'] != 'Tutorials':
            inside = [o['href'] for o in section['contents']]
            assert inside == sorted(inside) and len({o.split('/')[0] for o in inside}) == 1, section['section']

def test_index_lists_every_notebook():
    "The tables of the README have a row for every notebook, with its own title, module and description."
    index = '\n'.join(text(c['source']) for c in cells(root/'nbs'/'index.ipynb'))
    def row(nb):
        title, about = re.match(r'# (.*)\n\n> (.*)', text(cells(nb)[0]['source'])).groups()
        if not exported(nb): return f'| [{title}]({name(nb)}) | {about} |'
        return f'| [{nb.name[:2]} {title}]({name(nb)}) | `{exported(nb)}` | {about} |'
    report([row(o) for o in notebooks if name(o) != 'index.ipynb' and row(o) not in index], 'nbs/index.ipynb has this row')

def test_tutorials_open_in_colab():
    for nb in (o for o in notebooks if name(o).startswith('tutorials/')):
        first = '\n'.join(text(c['source']) for c in cells(nb)[:5])
        where = settings['git_url'].removeprefix('https://github.com/')
        assert f"colab.research.google.com/github/{where}/blob/{settings['branch']}/nbs/{name(nb)}" in first and f"install -q git+{settings['git_url']}'" in first, name(nb)

# ---- how notebooks and modules read

def export_cells(nb): return [c for c in cells(nb) if c['cell_type'] == 'code' and re.match(r'\s*#\|\s*exporti?\b', text(c['source']))]

def test_export_cells_are_small():
    "One definition to a cell: more than 45 lines (blank ones not counted) are more than one screen."
    size = lambda c: sum(1 for line in text(c['source']).splitlines() if line.strip())
    report([f"{name(o)}: {size(c)} lines, {text(c['source'])[10:60]!r}" for o in notebooks for c in export_cells(o) if size(c) > 45], 'A cell that exports has up to 45 lines')

def test_lines_are_short():
    lines = [(f'{o.relative_to(root)}:{i}', len(line)) for o in modules if o.name != 'all.py' for i, line in enumerate(o.read_text(encoding='utf-8').splitlines(), 1)]
    report([f'{where}: {n}' for where, n in lines if n > 160], 'A line of code has up to 160 characters')
    assert sum(n > 120 for _, n in lines) < .02*len(lines), 'Nearly all lines of code have up to 120 characters'

def test_every_exported_name_is_used_in_its_notebook():
    "An exported name appears in an example or a test of its own notebook."
    def defined(nb):
        for c in export_cells(nb):
            for o in ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', text(c['source']), flags=re.M)).body:
                if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not any('patch' in ast.unparse(d) for d in o.decorator_list): yield o.name
    problems = []
    for nb in notebooks:
        if not exported(nb): continue
        shown = '\n'.join(text(c['source']) for c in cells(nb) if c['cell_type'] == 'code' and c not in export_cells(nb))
        problems += [f'{name(nb)}: {o}' for o in defined(nb) if o[0] != '_' and not re.search(rf'\b{o}\b', shown)]
    report(problems, 'An exported name is used in an example or a test under it')

def test_prose_has_no_rooms_and_few_dolls():
    "Plain words: a notebook is a notebook, a network is a network."
    said = {name(o): '\n'.join(text(c['source']) for c in cells(o)) for o in notebooks}
    report([f'{k}: {m}' for k, v in said.items() for m in re.findall(r'.*\b[Rr]ooms?\b.*', v)], 'A module is not called a room')
    report([f'{k}: {m}' for k, v in said.items() if k not in ('index.ipynb', '1_model/04_nested_unet.ipynb') for m in re.findall(r'.*\b[Dd]olls?\b.*', v)], 'A network is not called a doll')

# ---- modules

def test_parts_are_numbered():
    for part in sorted(o for o in (root/'nbs').iterdir() if o.is_dir() and o.name[0].isdigit()):
        found = sorted(o.stem for o in part.glob('*.ipynb'))
        assert [o[:3] for o in found] == [f'{i:02d}_' for i in range(1, len(found) + 1)], f'{part.name} is numbered from 01 on: {found}'

def test_imports_go_down():
    "A notebook imports from earlier notebooks of its own part and from earlier parts."
    place = {exported(o): o.relative_to(root/'nbs').with_suffix('').as_posix() for o in notebooks if exported(o)}
    problems = [f'mdm/{dotted(o)} has no notebook' for o in modules if dotted(o) not in place]
    for nb in notebooks:
        if not (here := exported(nb)): continue
        inside = {m for tree in sources(nb) for pkg, m in imports(tree) if pkg == 'mdm'}
        problems += [f'{name(nb)} imports mdm.{m}' for m in sorted(inside & set(place)) if m != here and place[m] >= place[here]]
        problems += [f'{name(nb)} imports mdm.{m}, which is no module' for m in sorted(inside - set(place) - {'', '__version__'})]
    report(problems, 'A notebook imports only from earlier ones')

def test_modules_are_python_310():
    for o in modules: ast.parse(o.read_text(encoding='utf-8'), o.name, feature_version=(3, 10))

def test_import_needs_no_network():
    print(python(f'''
import socket
def refuse(*args, **kwargs): raise OSError('the network was asked for')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
import importlib
for m in {[dotted(o) for o in modules]!r}: importlib.import_module('mdm.' + m)
'''))

def test_import_is_light():
    "What a user may never need is imported when it is used."
    heavy = ['transformers', 'tokenizers', 'accelerate', 'ipywidgets', 'spacy', 'sentencepiece', 'nbdev', 'pytest']
    assert python(f'import mdm.all, sys; print([o for o in {heavy} if o in sys.modules])').strip() == '[]'

def public():
    "Every public function, class and method as (module.name, object)."
    for path in modules:
        module = importlib.import_module(f'mdm.{dotted(path)}')
        for k in getattr(module, '__all__', []):
            o = getattr(module, k)
            if getattr(o, '__module__', None) != module.__name__ or not (inspect.isfunction(o) or inspect.isclass(o)): continue
            yield f'{dotted(path)}.{k}', o
            if inspect.isclass(o): yield from ((f'{dotted(path)}.{k}.{m}', f) for m, f in methods(o))

def methods(cls):
    "Methods that people call, and those that say how to make and call an object; one that fills in a place of its base class is described there."
    for k, f in vars(cls).items():
        f = getattr(f, '__func__', f)
        if not inspect.isfunction(f) or f.__module__ != cls.__module__ or f.__code__.co_filename == '<string>': continue
        if k in ('__init__', '__call__') or not (k[0] == '_' or any(hasattr(o, k) for o in cls.__mro__[1:])): yield k, f

def hook(key): return re.search(r'\.(__init__|__call__|forward|rules|(before|after)_\w+)$', key)

def test_everything_has_a_docstring():
    report([k for k, o in public() if not (o.__doc__ or '').strip() and not hook(k)], 'A public thing has a docstring')

def undocumented(o):
    "Parameters of a function, or fields of a dataclass or named tuple, that no comment explains."
    if inspect.isclass(o):
        src = inspect.getsource(o) if is_dataclass(o) or hasattr(o, '_fields') else ''
        return [k for k in (inspect.get_annotations(o) if src else []) if not re.search(rf'^\s+{k}\s*:[^#\n]*#\s*\S', src, re.M)]
    docs = docments(o)
    return [k for k, p in inspect.signature(o).parameters.items() if k not in ('self', 'cls') and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not docs.get(k)]

def test_every_parameter_has_a_docment():
    from mdm.diffusion.settings import SampleConfig
    told = {k for k, v in docments(SampleConfig).items() if v}            # signatures that are made from its fields
    bad = lambda o: [k for k in undocumented(o) if k not in told]
    report([f"{k}: {', '.join(bad(o))}" for k, o in public() if bad(o)], 'A parameter has a comment that explains it')

# ---- packaging

def wanted(key): return {canonicalize_name(r.name): r for r in map(Requirement, settings[key].split())}
def pins(): return {canonicalize_name(k): v for k, v in (o.split('==') for o in (root/'constraints.txt').read_text().splitlines() if o and o[0] != '#')}

def test_requirements_are_pinned():
    bad = [str(r) for k in settings if k == 'requirements' or k.endswith('_requirements') for n, r in wanted(k).items() if n not in pins() or not r.specifier.contains(pins()[n])]
    report(bad, 'A requirement has a pin in constraints.txt that fits it')

def test_requirements_are_lower_bounds(): report([str(r) for r in wanted('requirements').values() if not re.fullmatch(r'>=[\d.]+', str(r.specifier))], 'A run-time requirement is a lower bound')

def test_imports_are_required():
    names, extras = dict(pil='pillow', yaml='pyyaml', ipython='ipywidgets'), [k for k in settings if k.endswith('_requirements') and k != 'dev_requirements']      # ipywidgets brings IPython
    wanted_for = lambda trees: {names.get(o.lower(), canonicalize_name(o)) for tree in trees for o, _ in imports(tree)} - {canonicalize_name(o) for o in sys.stdlib_module_names} - {'mdm'}
    trees = [ast.parse(o.read_text(encoding='utf-8')) for o in modules]
    on_import = [o for tree in trees for o in tree.body if isinstance(o, (ast.Import, ast.ImportFrom))]
    assert not (bad := wanted_for(on_import) - {*wanted('requirements')}), f'What mdm/ imports at once stands in the requirements: {bad}'
    assert not (bad := wanted_for(trees) - {o for k in ('requirements', *extras) for o in wanted(k)}), f'What mdm/ imports inside a function stands in the requirements or in an extra: {bad}'

def test_commands_exist():
    scripts = dict(o.split('=') for o in settings['console_scripts'].split())
    for target in scripts.values():
        module, function = target.split(':')
        assert callable(getattr(importlib.import_module(module), function)), target

def test_wheel_holds_everything(tmp_path):
    "Presets, the bundled model, templates and style sheets are in the wheel, which has the name of the distribution; none of the messages names another one."
    for p in tracked():
        if p.relative_to(root).parts[0] in ('nbs', 'tests'): continue
        (to := tmp_path/'src'/p.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, to)
    run(Path(sys.executable).name, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path/'out', '.', cwd=tmp_path/'src')
    wheel, = (tmp_path/'out').glob('*.whl')
    assert wheel.name.startswith(settings['lib_name'].replace('-', '_') + '-')
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = [p.relative_to(root).as_posix() for p in tracked() if p.relative_to(root).parts[0] == 'mdm']
    report([o for o in wanted if o not in held], 'The wheel holds every file of mdm/')
    assert any(o.endswith('.css') for o in held) and any(o.endswith('.jinja') for o in held) and any('/bundled/' in o for o in held)
    report([f'{o.relative_to(root)}' for o in modules if re.search(r"pip install ['\"]?mdm", o.read_text(encoding='utf-8'))], "A message names the distribution, not 'mdm', which is somebody else's")

def test_version_is_one():
    import mdm
    assert mdm.__version__ == settings['version']
    assert settings['version'] in (root/'CHANGELOG.md').read_text(encoding='utf-8')

# ---- nothing that does not belong

def test_top_level():
    "What an example wrote into the working folder is not of the project."
    known = set('''.ci .gitattributes .github .gitignore .pre-commit-config.yaml CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md
        _quarto.yml constraints.txt llms.txt mdm nbs pyproject.toml settings.ini setup.py tests'''.split())
    report(sorted({p.relative_to(root).parts[0] for p in tracked()} - known), 'The top level holds what it is known to hold')

# ---- nothing of one machine

def tracked():
    "The project's files: what git knows or would add; without git, everything but what is hidden or made."
    git = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=root, capture_output=True, text=True)
    if git.returncode == 0: return [p for o in git.stdout.split('\0') if o and (p := root/o).is_file()]
    return [p for p in root.rglob('*') if p.is_file() and not any(re.match(r'\.(?!ci|gitignore)|_docs|_proc|__pycache__|build$|dist$|runs$|demo$|.*\.egg-info', o) for o in p.relative_to(root).parts)]

def readable(path):
    "A file's text; of a notebook, all but its pictures; '' for what is not text."
    try: s = path.read_text(encoding='utf-8')
    except UnicodeDecodeError: return ''
    if path.suffix != '.ipynb': return s
    outs = [o for c in cells(path) for o in c.get('outputs', [])]
    shown = [text(v) for o in outs for k, v in o.get('data', {}).items() if not k.startswith('image/') and isinstance(v, (str, list))]
    shown += [text(o['text']) for o in outs if 'text' in o] + ['\n'.join(o['traceback']) for o in outs if 'traceback' in o]
    return '\n'.join([*(text(c['source']) for c in cells(path)), *(re.sub(r'base64,[\w+/=\s]+', '', o) for o in shown)])

def test_no_machine_paths():
    machine = re.compile(r'(?<![\w.$}])/(?:work|tmp|root|home|Users)/[\w.]+|\.\./shared\b')
    report([f'{p.relative_to(root)}: {m}' for p in tracked() for m in sorted(set(machine.findall(readable(p))))], 'No file names a place of one machine')

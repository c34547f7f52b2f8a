"What a command and an import load, and what they print before anything was asked for."
import ast, os, subprocess, sys
from pathlib import Path
import pytest
from make_readme import root
from test_project import settings

commands = dict(o.split('=') for o in settings['console_scripts'].split())
heavy = {'fastai', 'matplotlib', 'pandas', 'scipy', 'sklearn', 'pyarrow', 'transformers', 'torchvision', 'torchmetrics', 'accelerate', 'spacy', 'mdm.training', 'mdm.evaluation'}

def python(*args, **kwargs): return subprocess.run([sys.executable, *args], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)}, **kwargs)

def test_sampling_and_the_widget_load_only_what_they_need(tmp_path):
    show = f"print('loaded', *sorted(set(sys.modules) & {heavy | {'IPython'}!r}), file=sys.stderr)"
    code = ["import sys", "from mdm.cli.sample import mdm_sample", "assert mdm_sample(['shapes', 'a red circle', '--n', '1', '--steps', '1']) == 0", show, "import mdm.widgets.sampler", show]
    done = python('-c', '\n'.join(code), cwd=tmp_path)
    assert done.returncode == 0 and list(tmp_path.rglob('*.png')), done.stderr
    assert [o for o in done.stderr.splitlines() if o.startswith('loaded')] == ['loaded', 'loaded IPython']     # IPython comes with ipywidgets

@pytest.mark.parametrize('command', commands)
def test_commands_run_as_modules(command):
    module, name = commands[command].split(':')
    done = python('-m', module, '--help')
    assert done.returncode == 0 and done.stdout.startswith(f'usage: {name}'), done.stdout + done.stderr

def test_every_command_has_a_module():
    files = {f'mdm.cli.{p.stem}' for p in (root/'mdm'/'cli').glob('*.py') if p.stem not in ('__init__', 'command')}
    assert files == {o.split(':')[0] for o in commands.values()}

def first_imports(path):
    "Names of the modules that a file imports at its top, in order."
    for o in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(o, ast.Import): yield from (a.name for a in o.names)
        elif isinstance(o, ast.ImportFrom): yield '.'*o.level + (o.module or '')

def test_fastai_is_imported_quietly():
    bad = []
    for path in sorted((root/'mdm').rglob('*.py')):
        names = list(first_imports(path))
        fastai = [i for i, name in enumerate(names) if name.split('.')[0] == 'fastai']
        if fastai and 'mdm.utils.quiet' not in names[:fastai[0]]: bad.append(path.relative_to(root).as_posix())
    assert not bad, f'import mdm.utils.quiet before fastai: {bad}'
    done = python('-W', 'error::FutureWarning', '-c', 'import mdm.data.loader')                # what a Jupyter user would see in red
    assert done.returncode == 0 and not done.stderr, done.stderr

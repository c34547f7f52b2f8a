"Make pyproject.toml from settings.ini: `python tests/make_pyproject.py`. nbdev 2 reads settings.ini; nbdev 3 reads the [tool.nbdev] table that is made here."
import json
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
for_nbdev = 'lib_path nbs_path doc_path tst_flags recursive readme_nb put_version_in_init jupyter_hooks clean_ids branch custom_sidebar title'.split()
in_setup = 'keywords version dependencies optional-dependencies readme license authors classifiers entry-points scripts'.split()

def settings():
    "The facts of settings.ini."
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def value(text): return text.lower() if text in ('True', 'False') else json.dumps(text, ensure_ascii=False)

def pyproject():
    "The text of pyproject.toml."
    s = settings()
    return '\n'.join([
        '# Made from settings.ini by `make export`: edit that one.',
        '[build-system]', 'requires = ["setuptools>=64.0"]', 'build-backend = "setuptools.build_meta"', '',
        '[project]', f'name="{s["lib_name"]}"', f'requires-python=">={s["min_python"]}"', f'description = {value(s["description"])}',
        f'dynamic = {json.dumps(in_setup)}', '',
        '[project.urls]', f'Repository = {value(s["git_url"])}', f'Documentation = {value(s["doc_host"] + s["doc_baseurl"])}', f'Changelog = {value(s["git_url"] + "/blob/" + s["branch"] + "/CHANGELOG.md")}', '',
        '[tool.nbdev]', *(f'{k} = {value(s[k])}' for k in for_nbdev), '',
        '[tool.uv]', 'cache-keys = [{ file = "pyproject.toml" }, { file = "settings.ini" }, { file = "setup.py" }]', ''])

if __name__ == '__main__': (root/'pyproject.toml').write_text(pyproject(), encoding='utf-8')

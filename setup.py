"Packaging: everything comes from settings.ini, read with the standard library alone."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cp = ConfigParser(delimiters=['='], interpolation=None)
cp.read(here/'settings.ini', encoding='utf-8')
cfg = cp['DEFAULT']

readme = here/'README.md'
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}   # data, app, eval, log, dev
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    packages=find_packages(include=['mdm', 'mdm.*']), package_data={'mdm': ['presets/*.yaml', 'bundled/*/*', '*/*.css', '*/*.html', '*/*.jinja']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={**extras, 'dev': sum(extras.values(), [])},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Natural Language :: English',
                 'Programming Language :: Python :: 3.10', 'Programming Language :: Python :: 3.11',
                 'Programming Language :: Python :: 3.12'],
    zip_safe=False)

"Packaging: everything comes from settings.ini, read with the standard library alone."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

readme = here/'README.md'
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}   # data, app, eval, log, dev
pythons = [f'3.{minor}' for minor in range(10, 15)]
setup(
    name=cfg['lib_name'], version=cfg['version'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    packages=find_packages(include=['mdm', 'mdm.*']),
    package_data={'mdm': ['presets/*.yaml', 'bundled/*/*', '*/*.css', '*/*.js', '*/*.jinja']},
    install_requires=cfg['requirements'].split(),
    extras_require={**extras, 'dev': sum(extras.values(), [])},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'mdm.formats': cfg['formats'].split(),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Education',
                 'Intended Audience :: Science/Research', 'Natural Language :: English', 'Operating System :: OS Independent',
                 'Framework :: Jupyter', 'Topic :: Multimedia :: Graphics', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Programming Language :: Python :: 3 :: Only', *(f'Programming Language :: Python :: {o}' for o in pythons)],
    zip_safe=False)

"""Run notebooks as `nbdev_test` does, each in a process of its own: no seed or switch of one reaches the next.

    python tests/run_notebooks.py [--jobs 2] [NOTEBOOK ...]

A hundred processes that each import PyTorch and fastai would spend minutes on it, so each is a fork of a process that has
imported `packages`, and nothing of ours.
"""
import argparse, multiprocessing, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

packages = ['torch', 'numpy', 'PIL.Image', 'einops', 'matplotlib.pyplot', 'fastai.learner', 'fastai.callback.progress',
            'fastai.optimizer', 'nbdev.test', 'nbdev.showdoc', 'fastcore.all', 'webdataset', 'ipywidgets', 'pydantic']

def run_cells(path):
    "Run a notebook; the exit status tells how it went."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    config = get_config()
    passed, _ = test_nb(path, skip_flags=config.tst_flags.split(), basepath=config.config_path)
    sys.exit(0 if passed else 1)

def run_notebook(path, context):
    "Whether a notebook ran to its end."
    start, process = time.time(), context.Process(target=run_cells, args=(path.absolute(),))
    process.start()
    process.join()
    print(f"{path}: {'passed' if process.exitcode == 0 else f'FAILED (exit status {process.exitcode})'} in "
          f'{time.time() - start:.0f} s', flush=True)
    return process.exitcode == 0

def main(args=None):
    "0 if all notebooks ran, else 1."
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('paths', nargs='*', type=Path, metavar='NOTEBOOK', help='all of nbs if left out')
    p.add_argument('--jobs', type=int, default=2, help='notebooks at a time')
    args = p.parse_args(args)
    from nbdev.doclinks import nbglob
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(packages)
    paths = [Path(os.path.relpath(o)) for o in args.paths or sorted(nbglob(as_path=True))]
    with ThreadPoolExecutor(args.jobs) as pool: passed = list(pool.map(lambda o: run_notebook(o, context), paths))
    print(f'{sum(passed)} of {len(passed)} notebooks ran')
    return 0 if all(passed) else 1

if __name__ == '__main__': sys.exit(main())

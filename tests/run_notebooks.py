"""Run the cells of notebooks as `nbdev_test` does, each notebook in a process of its own.

    python tests/run_notebooks.py [--jobs 2] [NOTEBOOK ...]

So no seed or switch of one notebook reaches the next. A hundred processes that each import PyTorch and fastai would spend minutes
on it, so on Linux each is a fork of a process that has imported `packages`, and nothing of ours. Files that a notebook leaves in
the temporary folder are removed at its end.
"""
import argparse, multiprocessing, os, sys, tempfile, time
from multiprocessing.connection import wait
from pathlib import Path

packages = ['torch', 'fastai.learner', 'fastai.optimizer', 'fastai.callback.progress', 'nbdev.test', 'nbdev.showdoc']

def run_cells(path, method):
    "Run a notebook whose own processes start by `method`; the exit status tells how it went."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    here = str(Path(__file__).parent)
    sys.path[:] = [o for o in sys.path if o != here]         # a reader's notebook does not see the tests
    multiprocessing.set_start_method(method, force=True)     # not the one by which this process started
    config = get_config()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tempfile.tempdir:
        os.environ['TMPDIR'] = tempfile.tempdir
        passed, _ = test_nb(path, skip_flags=config.tst_flags.split(), basepath=config.config_path)
    sys.exit(0 if passed else 1)

def run_all(paths, jobs):
    "Run notebooks, some at a time; returns how many ran to their end."
    usual = multiprocessing.get_start_method()
    context = multiprocessing.get_context('forkserver' if sys.platform == 'linux' else 'spawn')
    if sys.platform == 'linux': context.set_forkserver_preload(packages)
    left, running, passed = list(reversed(paths)), {}, 0
    try:
        while left or running:
            while left and len(running) < jobs:
                path = left.pop()
                process = context.Process(target=run_cells, args=(path.absolute(), usual))
                process.start()
                running[process.sentinel] = path, process, time.time()
            for ended in wait(list(running)):
                path, process, start = running.pop(ended)
                process.join()
                passed += process.exitcode == 0
                told = 'passed' if process.exitcode == 0 else f'FAILED (exit status {process.exitcode})'
                print(f'{path}: {told} in {time.time() - start:.0f} s', flush=True)
    finally:
        for _, process, _ in running.values(): process.terminate()
    return passed

def main(args=None):
    "0 if there are notebooks and all ran, else 1."
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('paths', nargs='*', type=Path, metavar='NOTEBOOK', help='all of nbs if left out')
    p.add_argument('--jobs', type=int, default=2, help='notebooks at a time')
    args = p.parse_args(args)
    from nbdev.doclinks import nbglob
    paths = [Path(os.path.relpath(o)) for o in args.paths or sorted(nbglob(as_path=True))]
    passed = run_all(paths, args.jobs)
    print(f'{passed} of {len(paths)} notebooks ran')
    return 0 if paths and passed == len(paths) else 1

if __name__ == '__main__': sys.exit(main())

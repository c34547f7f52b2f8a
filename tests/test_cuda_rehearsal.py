"The rehearsal of a GPU (`cuda_rehearsal.py`), in a process of its own."
import os, re, subprocess, sys
from pathlib import Path

here = Path(__file__).resolve().parent

def test_what_a_gpu_would_run():
    "Every test of the file passes, and none is skipped. Alone: `python -m pytest tests/cuda_rehearsal.py`."
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')}
    command = [sys.executable, '-m', 'pytest', here/'cuda_rehearsal.py', '-q', '--tb=short', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-p', 'no:unraisableexception']
    done = subprocess.run(list(map(str, command)), cwd=here.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 35 and 'skipped' not in done.stdout

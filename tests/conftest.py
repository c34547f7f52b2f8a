"Every test runs without the hub, and with as many threads as OMP_NUM_THREADS says."
import os, sys
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'
sys.path.insert(0, str(Path(__file__).parent))

def pytest_configure(config): config.addinivalue_line('markers', 'gpu: needs NVIDIA GPUs, and is skipped, with a reason that says so, where there are none')

def pytest_collection_modifyitems(items):
    "The slowest test begins, or one process would be left with it while all others are done."
    items.sort(key=lambda o: o.path.name != 'test_cuda_rehearsal.py')

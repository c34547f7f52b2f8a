"Progress of long work: a bar on a terminal, plain lines in a log."
import io, sys
import pytest
from mdm.cli.evaluate import stage_bars
from mdm.data.shards import items_bar
from mdm.utils import progress

class Terminal(io.StringIO):
    def isatty(self): return True

@pytest.fixture
def clock(monkeypatch):
    "Every look at the clock is six seconds later."
    now = [0.]
    def monotonic():
        now[0] += 6
        return now[0]
    monkeypatch.setattr(progress.time, 'monotonic', monotonic)

def written(monkeypatch, stream, work):
    monkeypatch.setattr(sys, 'stderr', stream)
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    work()
    return stream.getvalue()

def stages():
    with stage_bars() as show:
        for what in ('pictures', 'features'):
            for k in range(1, 7): show(what, k, 6)

works = dict(items=lambda: list(items_bar(range(6), 'samples', 6)), update=lambda: [(b := progress.bar(None, 'download', 6e6, 'MB', scale=1e6)).update(1e6) for _ in range(6)], stages=stages)

@pytest.mark.parametrize('work', works)
def test_a_log_gets_plain_lines(work, monkeypatch, clock):
    text = written(monkeypatch, io.StringIO(), works[work])
    lines = text.splitlines()
    assert '\r' not in text and '\x1b' not in text and (2 <= len(lines) <= 12 or work == 'update') and all('/s' in o and ': ' in o for o in lines)
    if work == 'items': assert lines[-1].startswith('samples: 6 of 6 samples')

@pytest.mark.parametrize('work', works)
def test_short_work_writes_nothing_into_a_log(work, monkeypatch): assert written(monkeypatch, io.StringIO(), works[work]) == ''

@pytest.mark.parametrize('work', works)
def test_a_terminal_gets_a_bar(work, monkeypatch): assert '\r' in written(monkeypatch, Terminal(), works[work])

def test_no_bar_where_none_is_wanted(monkeypatch, clock):
    for stream in (io.StringIO(), Terminal()): assert written(monkeypatch, stream, lambda: list(items_bar(range(6), 'samples', 6, False))) == ''

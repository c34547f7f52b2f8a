"""What a command costs before it works, what a visitor of the page costs in memory, and how fast the page answers.

    python tests/bench/visitors.py               # 5 rounds, 3 visitors
    python tests/bench/visitors.py --rehearse    # 1 round, 1 visitor, forked

Start-up: `import torch` and `mdm_sample shapes` (one picture, four steps) take turns; the quotient of the medians counts.
Memory: programs fetch the page of `mdm_app shapes`, with visitors forked from one process and with ordinary processes; private is
what nobody else has (USS), share is private plus the process's part of what is shared (PSS). Linux only.
Answers: Chromium opens the page of a student; the time from a press of Run, with four pictures, until the page says Done.
"""
import argparse, http.client, os, re, signal, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import mean, median
import psutil

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2]), 'HF_HUB_OFFLINE': '1'}
sample = "from mdm.cli.sample import mdm_sample; mdm_sample(['shapes', 'a red circle', '--n', '1', '--steps', '4'])"

def seconds(code, folder):
    "How long a fresh Python takes to run some code."
    start = time.perf_counter()
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=folder, env=env, check=True, capture_output=True)
    return time.perf_counter() - start

def startup(rounds):
    with tempfile.TemporaryDirectory() as folder: times = [(seconds('import torch', folder), seconds(sample, folder)) for _ in range(rounds)]
    torch, ours = (median(o) for o in zip(*times))
    print(f'import torch {torch:.2f} s, mdm_sample shapes {ours:.2f} s: {ours/torch:.2f} times (medians of {rounds})')

def serve(folder, fork, model='shapes'):
    "Start the page; returns its process and port."
    code = 'import sys; from mdm.cli import app\n' + ('' if fork else 'app._start_forks = lambda *args: None\n') + "sys.exit(app.mdm_app(['" + model + "', '--port', '0', '--visitors', '9', '--device', 'cpu']))"
    server = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    return server, int(re.search(r':(\d+)/', server.stdout.readline())[1])

def memory(visitors, fork):
    with tempfile.TemporaryDirectory() as folder:
        server, port = serve(folder, fork)
        for _ in range(visitors):
            c = http.client.HTTPConnection('127.0.0.1', port, timeout=300)
            c.request('GET', '/')
            c.getresponse().read()                                # the widget is there when the page is whole
        time.sleep(3)                                             # it loads its model
        processes = psutil.Process(server.pid).children(recursive=True)
        kernels = [o for o in processes if not fork or o.ppid() != server.pid]
        assert len(kernels) == visitors, processes
        infos = [o.memory_full_info() for o in kernels]
        whole = sum(psutil.Process(o).memory_full_info().pss for o in [server.pid, *(o.pid for o in processes)])
        rss, pss, uss = (mean(getattr(o, name) for o in infos)/1e6 for name in ('rss', 'pss', 'uss'))
        print(f"{'forked' if fork else 'ordinary'}: a visitor of {visitors} has {uss:.0f} MB private, {pss:.0f} MB as a share, {rss:.0f} MB resident; all processes together {whole/1e6:.0f} MB")
        server.send_signal(signal.SIGTERM)
        server.wait(60)

answer = """() => new Promise(told => {
    const start = performance.now(); let begun = false
    const look = () => {
        const done = document.querySelector('[role=status]').innerText.includes('Done')
        if (done && begun) return told((performance.now() - start)/1000)
        begun = begun || !done
        requestAnimationFrame(look)
    };
    [...document.querySelectorAll('button')].find(o => o.innerText.trim() == 'Run').click()
    requestAnimationFrame(look)
})"""

def answers(model, rounds):
    "How fast the page of a model draws four pictures."
    from browser import find_browser
    from playwright.sync_api import sync_playwright
    if not (chromium := find_browser()): return print('no Chromium: make browser')
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        server, port = serve(folder, True, model)
        page = p.chromium.launch(executable_path=chromium, args=['--no-sandbox']).new_page()
        page.goto(f'http://127.0.0.1:{port}/')
        page.wait_for_function("document.querySelector('[role=status]')?.innerText.startsWith('Ready')", timeout=120_000)
        times = [page.evaluate(answer) for _ in range(rounds + 1)][1:]               # the first one warms up
        print(f'the page of {model} draws four pictures in {median(times):.2f} s (median of {rounds})')
        server.send_signal(signal.SIGTERM)
        server.wait(60)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rehearse', action='store_true')
    small = parser.parse_args().rehearse
    startup(1 if small else 5)
    for fork in (True,) if small else (True, False): memory(1 if small else 3, fork)
    for model in ('shapes_fast',) if small else ('shapes_fast', 'emoji_fast'): answers(model, 1 if small else 7)

"What tests that kill a training run in processes of their own: modules are imported once, by a fork server, and every training is a fork of it."
import importlib, multiprocessing, os, resource, signal, sys

servers = multiprocessing.get_context('forkserver')

def start(argv, log, **wishes):
    "Start `mdm_train` with a list of arguments in a process; what it prints goes to a file."
    os.environ |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    servers.set_forkserver_preload(['mdm.cli.train', 'mdm.training.learner', 'mdm.cli.command', 'train_child'])
    p = servers.Process(target=train, args=([*map(str, argv)], str(log)), kwargs=wishes)
    p.start()
    return p

def finish(p, seconds=300):
    "Wait; the exit code, negative for a signal."
    p.join(seconds)
    assert p.exitcode is not None, 'the training hangs'
    return p.exitcode

def train(argv, log, die_at=None, full_at=None, slow_after=None, nap=1, die_saving=False, slow_valid=None):
    "Train; `die_at`: be killed at that call of the file system's; `die_saving`: in the first save; `full_at`: let the disk be full for that save; `slow_after`: sleep for `nap` seconds in the steps after that one; `slow_valid`: in every batch of a validation, so long."
    multiprocessing.set_start_method('fork', force=True)     # of processes that read data: as in a training that was started from a shell
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1); os.dup2(out, 2)
    if die_at is not None: count_down(die_at)
    if full_at is not None: fill_disk(full_at)
    if die_saving: importlib.import_module('mdm.training.resume').save_checkpoint = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    if slow_after is not None: slow_down(slow_after, nap)
    if slow_valid is not None: slow_down(0, slow_valid, validation=True)
    from mdm.cli.train import mdm_train
    code = mdm_train(argv)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)

def count_down(n):
    "Kill this process, as by SIGKILL, right before or after the n-th change to the file system."
    left = [n]
    def watched(f):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            res = f(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return res
        return call
    for k in ('rename', 'replace', 'fsync', 'unlink', 'rmdir', 'mkdir'): setattr(os, k, watched(getattr(os, k)))
    import mdm.checkpoint, mdm.training.resume
    mdm.checkpoint.write_safetensors = watched(mdm.checkpoint.write_safetensors)
    mdm.training.resume.save_checkpoint = watched(mdm.training.resume.save_checkpoint)

def fill_disk(which):
    "No file may grow beyond 20 kB while the checkpoint of that number (0: the first) is saved: the operating system itself refuses."
    import mdm.training.resume
    real, calls = mdm.training.resume.save_checkpoint, []
    def save(*args, **kwargs):
        calls.append(1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(calls) - 1 == which: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try: return real(*args, **kwargs)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    mdm.training.resume.save_checkpoint = save

def slow_down(after, nap, validation=False):
    "Say so and sleep in the middle of each step after a number of steps."
    import time
    from mdm.training.callbacks import Noising
    real = Noising.before_batch
    def before_batch(self):
        if self.learn.steps >= after and self.training != validation: print('slow validation' if validation else 'slow now', flush=True); time.sleep(nap)
        real(self)
    Noising.before_batch = before_batch

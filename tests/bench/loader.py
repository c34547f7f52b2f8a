"""How many pictures a second the loader reads, over those of webdataset with Pillow, as ratios that are measured side by side.

    python tests/bench/loader.py [--pictures 200] [--rounds 5] [--workers 0] [--cases 1024x768:256,...]

Shards of random pictures with the spectrum of photographs (JPEG, quality 90) are read from a folder in memory or on the disk, decoded, cropped to squares, resized and put into batches of bytes [32,3,S,S].
Three peers, all with webdataset and Pillow: `plain` decodes whole pictures, `draft` lets the JPEG decoder leave out detail down to twice the wanted side as our loader does, and `coarse` down to the wanted
side itself, which is faster and blurs. The ways take turns; the least time of each counts. Without workers it is the seconds of this process (`time.process_time`), so that other programs on the machine
disturb less; with workers it is the clock. `error` is the mean distance, in grey levels, of the squares to those of `plain`; `worst 1%` is what one value in a hundred exceeds."""
import argparse, io, sys, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np

CASES = '1024x768:256,2048x1536:256,512x384:256,640x480:64'


def photograph(rng, w, h):
    "A random picture whose spectrum falls with the frequency, as that of photographs does."
    from PIL import Image
    waves = rng.normal(size=(3, h, w // 2 + 1)) + 1j * rng.normal(size=(3, h, w // 2 + 1))
    frequency = np.hypot(np.fft.fftfreq(h)[:, None] * h, np.arange(w // 2 + 1)[None])
    noise = np.fft.irfft2(waves / np.maximum(frequency, 1)**1.1, (h, w))
    grey = noise[:1] / noise[0].std() + .4 * noise / noise.std()
    return Image.fromarray((127 + 60 * grey).clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def write(folder, w, h, n, different=8):
    "A shard of `n` pictures, of which a few differ."
    import tarfile
    rng, files = np.random.default_rng(0), []
    for _ in range(min(different, n)):
        f = io.BytesIO()
        photograph(rng, w, h).save(f, 'JPEG', quality=90)
        files.append(f.getvalue())
    with tarfile.open(Path(folder)/'0.tar', 'w') as tar:
        for i in range(n):
            for ext, data in (('jpg', files[i % len(files)]), ('txt', b'a picture')):
                info = tarfile.TarInfo(f'{i:06d}.{ext}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(Path(folder)/'0.tar')


def square(sample, size, least):
    "What people write around webdataset: (array [size,size,3], caption)."
    from PIL import Image
    img = Image.open(io.BytesIO(sample['jpg']))
    if least: img.draft('RGB', (least, least))
    img = img.convert('RGB')
    side = min(img.size)
    x, y = ((n - side) // 2 for n in img.size)
    img = img.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return np.asarray(img), sample['txt'].decode()


def batch_of(samples):
    import torch
    images, captions = zip(*samples)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions


def peer(tar, size, batch, workers, least):
    import webdataset
    from torch.utils.data import DataLoader
    data = webdataset.WebDataset(tar, shardshuffle=False, empty_check=False).map(partial(square, size=size, least=least)).batched(batch, collation_fn=batch_of)
    return DataLoader(data, batch_size=None, num_workers=workers)


def ours(tar, size, batch, workers):
    from mdm.data.loader import create_loader
    from mdm.data.stream import DataConfig
    return create_loader(DataConfig(files=[tar], image_size=size, workers=workers), batch, train=False)


def measure(tar, size, batch, workers, rounds):
    "Name of each way -> (least seconds, its first batch)."
    ways = dict(ours=lambda: ours(tar, size, batch, workers), plain=lambda: peer(tar, size, batch, workers, 0),
                draft=lambda: peer(tar, size, batch, workers, 2 * size), coarse=lambda: peer(tar, size, batch, workers, size))
    clock = time.perf_counter if workers else time.process_time
    least, first = dict.fromkeys(ways, float('inf')), {}
    for _ in range(rounds):
        for name, make in ways.items():
            loader = make()
            start = clock()
            for b in loader: first.setdefault(name, b[0])
            least[name] = min(least[name], clock() - start)
    return {name: (least[name], first[name]) for name in ways}


def main(argv=None):
    import torch
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pictures', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--cases', default=CASES, help='WIDTHxHEIGHT:SIDE of the pictures and the squares, with commas (%(default)s)')
    parser.add_argument('--rehearse', action='store_true', help='a few small pictures, to see that it runs')
    args = parser.parse_args(argv)
    if args.rehearse: args.pictures, args.rounds, args.cases = 6, 1, '96x64:16'
    torch.set_num_threads(1)
    print(f'{"pictures":>12} {"side":>5} {"ours/s":>8} {"/plain":>7} {"/draft":>7} {"/coarse":>7} {"error":>6} {"worst 1%":>8} {"of draft":>8} {"of coarse":>9}')
    for case in args.cases.split(','):
        (w, h), size = map(int, case.split(':')[0].split('x')), int(case.split(':')[1])
        with tempfile.TemporaryDirectory() as folder:
            found = measure(write(folder, w, h, args.pictures), size, min(32, args.pictures), args.workers, args.rounds)
        seconds = {k: v[0] for k, v in found.items()}
        errors = {k: np.abs(np.subtract(v[1].numpy(), found['plain'][1].numpy(), dtype=int)) for k, v in found.items()}
        ratios = ' '.join(f'{seconds[k] / seconds["ours"]:7.2f}' for k in ('plain', 'draft', 'coarse'))
        print(f'{f"{w} x {h}":>12} {size:5} {args.pictures / seconds["ours"]:8.0f} {ratios} {errors["ours"].mean():6.2f} {np.percentile(errors["ours"], 99):8.0f} '
              f'{errors["draft"].mean():8.2f} {errors["coarse"].mean():9.2f}', flush=True)


if __name__ == '__main__': sys.exit(main())

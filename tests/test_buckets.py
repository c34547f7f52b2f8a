"Rectangles: buckets of sizes in the data, networks and sampler at sizes other than squares, and `--size`."
import io, warnings
from collections import Counter

import numpy as np, pytest, torch
from PIL import Image
from data_tools import encode, good, load, quiet, stream, tar_bytes
from tiny_models import small
from mdm.checkpoint import load_checkpoint
from mdm.data.loader import PictureLoader, create_dls
from mdm.data.samples import load_picture
from mdm.diffusion.objective import Diffusion, DiffusionConfig
from mdm.diffusion.sampler import SampleConfig, sample
from mdm.models.nested_unet import NestedUNetConfig, create_model
from mdm.models.unet import UNetConfig
from mdm.recipe import RecipeError, load_recipe
from mdm.training.learner import mdm_learner
from mdm.training.resume import Checkpoints
from mdm.utils.pictures import to_rgb
from mdm.utils.sizes import kept_share, nearest_size, read_size

shapes = [(40, 40), (30, 50), (50, 30), (44, 40), (60, 30), (30, 60)]
buckets = ['8x8', '6x10', '10x6']


def picture(i, size):
    img = Image.effect_noise(size, 30).convert('RGB')
    img.putpixel((0, 0), (i, 0, 0))
    return img


def write(folder, n, name='mixed.tar', broken=(), which=lambda i: shapes[i % len(shapes)]):
    files = []
    for i in range(n):
        files += [(f'{i:03d}.png', b'junk' if i in broken else encode(picture(i, which(i)))), (f'{i:03d}.txt', f'{i} {which(i)[0]}x{which(i)[1]}'.encode())]
    (folder/name).write_bytes(tar_bytes(files))
    return [str(folder/name)]


def size(batch): return tuple(batch[0].shape[:1:-1])
def numbers(batches): return [int(c.split()[0]) for b in batches for c in b[1]]
def same(x, y): return len(x) == len(y) and all(a[1] == b[1] and torch.equal(a[0], b[0]) and torch.equal(a[2]['scale'], b[2]['scale']) for a, b in zip(x, y))


def test_pictures_go_to_the_size_that_cuts_least(tmp_path):
    files = write(tmp_path, 60)
    loader = load(files, 5, True, shuffle=20, buckets=buckets)
    batches = list(loader)
    assert all(len(b[1]) == 5 for b in batches) and len({size(b) for b in batches}) == 3
    assert sorted(numbers(batches)) == list(range(60))                       # leftovers were joined: nothing is lost
    moved, sizes = 0, [read_size(o) for o in buckets]
    for b in batches:
        for caption in b[1]: moved += nearest_size(read_size(caption.split()[1]), sizes) != size(b)
    assert moved == loader.moved <= 12 and loader.size_counts == Counter({f'{w}x{h}': 5*sum(size(b) == (w, h) for b in batches) for w, h in map(size, batches)})
    assert not same(batches, list(loader))                                   # the next epoch has another order
    again = load(files, 5, True, shuffle=20, buckets=buckets)
    assert same(batches, list(again))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('epoch_size', [None, 36])
def test_resume_is_exact_after_every_batch(tmp_path, workers, epoch_size):
    kw = dict(shuffle=9, buckets=buckets, crop='random', workers=workers, epoch_size=epoch_size)
    files = write(tmp_path, 40, broken=(3, 17))
    loader, whole, places = load(files, 4, True, **kw), [], []
    for _ in range(2):
        for b in quiet_iter(loader): whole.append(b), places.append(loader.state_dict())
    for n in range(1, len(whole), 1 if not workers else 3):
        again = load(files, 4, True, **kw)
        again.load_state_dict(places[n-1])
        rest = []
        while len(rest) < len(whole) - n: rest += quiet(again)
        assert same(rest, whole[n:]), n


def quiet_iter(loader):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield from loader


@pytest.mark.parametrize('workers', [1, 3])
def test_ranks_have_equally_many_batches_whatever_they_meet(tmp_path, workers):
    "The first half of the row is upright, the second lies, some of it is broken: every process still takes the same number of steps."
    files = write(tmp_path, 61, broken=(1, 2, 50), which=lambda i: (30, 50) if i < 30 else (50, 30) if i < 50 else (40, 40))
    for kw in (dict(shuffle=0), dict(shuffle=30), dict(epoch_size=50)):
        for rank in range(3):
            loader = PictureLoader(stream(files, rank, 3, 4, buckets=buckets, **kw))
            loader.workers = 0
            batches = quiet(loader)
            assert len(batches) == len(loader) == (50 if 'epoch_size' in kw else 61)//12 and all(len(b[1]) == 4 for b in batches)


def test_rare_shapes_are_trained_on_and_reported(tmp_path):
    files = write(tmp_path, 20, which=lambda i: (30, 50) if i == 7 else (40, 40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        loader = load(files, 5, True, buckets=buckets)
        assert 7 in numbers(loader) and loader.moved == 1
        assert not caught                                                    # one picture of twenty is not worth a warning
        list(load(files, 16, True, buckets=buckets))
    assert len(caught) == 1 and '4 were left over' in str(caught[0].message)


def test_validation_reads_everything_once(tmp_path):
    files = write(tmp_path, 31)
    for workers in (0, 2):
        batches = list(load(files, 4, buckets=buckets, workers=workers))
        assert sorted(numbers(batches)) == list(range(31))
        assert all(size(b) == nearest_size(read_size(c.split()[1]), [read_size(o) for o in buckets]) for b in batches for c in b[1])


def before(data, size, place=(.5, .5)):
    "How a square was cut before there were rectangles."
    img = Image.open(io.BytesIO(data))
    scale = min(img.size)
    img.draft(None, (2*size, 2*size))
    img = to_rgb(img)
    side = min(img.size)
    number = int if side == size else float
    x, y = (number((n - side)*p) for n, p in zip(img.size, place))
    return img.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side), reducing_gap=3.), scale


def test_squares_stay_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(64, 64), (65, 64), (33, 97), (200, 131), (517, 389), (16, 21), (1000, 700)]):
        data = encode(picture(i, (w, h)), **(dict(kind='jpeg') if i % 2 else {}))
        for place in ((.5, .5), tuple(rng.random(2))):
            (new, scale), (old, was) = load_picture(data, 32, place), before(data, 32, place)
            assert scale == was and type(scale) is int and np.abs(np.asarray(new).astype(int) - np.asarray(old)).max() <= 4   # resized by PyTorch now
    loader = load(write(tmp_path, 12), 4, True)
    next(iter(loader))
    state = loader.state_dict()
    assert 'sizes' not in state and 'buckets' not in state['settings'] and not {'held', 'moved'} & set(state['readers'][0])


def test_scale_is_that_of_the_part_that_is_shown():
    data = encode(picture(1, (300, 200)))
    assert load_picture(data, 32)[1] == 200
    cut, scale = load_picture(data, [(48, 32)])
    assert cut.size == (48, 32) and scale == round((300*200)**.5)
    turned = Image.new('RGB', (300, 200), 'red')
    exif = turned.getexif()
    exif[0x112] = 6                                                          # stored lying, seen upright
    f = io.BytesIO()
    turned.save(f, 'jpeg', exif=exif)
    assert load_picture(f.getvalue(), [(48, 32), (32, 48)])[0].size == (32, 48)


def test_networks_take_rectangles_at_all_resolutions():
    "A nest of three: 32 x 48 in 64 x 96 in 256 x 384, upright and lying, loss and sample."
    plain = dict(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[0, 0], num_groups=4, time_dim=32, num_heads=1)
    inner = UNetConfig(**{**plain, 'num_attention_layers': [0, 1]}, micro_conditioning={'scale': 64})
    middle = NestedUNetConfig(**plain, inner=inner)
    torch.manual_seed(0)
    model = create_model(NestedUNetConfig(**{**plain, 'channels': [8, 8, 8], 'num_resnets': [1, 1, 1], 'num_attention_layers': [0, 0, 0]}, inner=middle), 8)
    assert model.scales == [8, 2, 1]
    diffusion = Diffusion(DiffusionConfig(double_loss=True), model.scales)
    for h, w in ((256, 384), (384, 256)):
        loss = diffusion.loss(model, torch.rand(2, 3, h, w)*2 - 1, torch.randn(2, 3, 8), torch.ones(2, 3), {'scale': torch.tensor([64., 32.])})
        loss.loss.backward()
        assert [o.shape[2:] for o in loss.x0] == [(h, w), (h//4, w//4), (h//8, w//8)] and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    drawn = sample(model, diffusion, (64, 96), torch.randn(1, 3, 8), torch.ones(1, 3), config=SampleConfig(steps=2, guidance=1.))
    assert [tuple(o.shape[2:]) for o in drawn] == [(64, 96), (16, 24), (8, 12)]


def recipe_of(tmp_path, *changes): return load_recipe('shapes', [*small, 'data.buckets=[16x16,24x16,16x24]', f'train.output={tmp_path/"run"}', *changes])


def test_a_tiny_model_trains_on_rectangles_and_draws_them(tmp_path, capsys):
    from mdm.training.run import run_training
    from mdm.cli.sample import mdm_sample
    files = write(tmp_path, 30)
    recipe = recipe_of(tmp_path, f'data.files={files}', 'train.steps=6', 'train.preview_every=6', 'train.preview_prompts=[a,b,c]')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = run_training(recipe)
    assert learn.steps == 6 and len(learn.dls.train.size_counts) > 1
    told = capsys.readouterr()
    assert '16x16, 24x16, 16x24' in told.out + told.err and 'sizes of this epoch' in told.out + told.err
    sheet = Image.open(tmp_path/'run'/'previews'/'step_00000006.png')
    assert sheet.width > 3*24
    for text in ('24x16', '16x24', '32x16'):
        assert mdm_sample([str(tmp_path/'run'), 'a', '--n', '1', '--size', text, '--output', str(tmp_path/text), '--device', 'cpu', '--steps', '1', '--every-resolution']) == 0
        w, h = read_size(text)
        assert sorted(Image.open(p).size for p in (tmp_path/text/'0001').iterdir()) == [(w//2, h//2), (w, h)]
    assert Image.open(next((tmp_path/'24x16'/'0001').glob('*seed0.png'))).text['size'] == '24x16'
    assert mdm_sample([str(tmp_path/'run'), 'a', '--size', '25x16', '--device', 'cpu']) == 2 and 'the nearest size is 24x16' in capsys.readouterr().err
    assert mdm_sample([str(tmp_path/'run'), 'a', '--size', 'wide', '--device', 'cpu']) == 2 and 'is no size' in capsys.readouterr().err


def test_a_training_stopped_among_rectangles_goes_on_exactly(tmp_path):
    files = write(tmp_path, 30)
    def learner():
        recipe = recipe_of(tmp_path, f'data.files={files}')
        torch.manual_seed(0)
        return mdm_learner(create_dls(recipe.data, 4, device='cpu'), recipe)
    def fit(learn, *cbs):
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit_steps(9, cbs=cbs)
        return learn
    whole = fit(learner(), Checkpoints(tmp_path/'saved', 4, 9))
    resumed = learner()
    resumed.resume(load_checkpoint(tmp_path/'saved'/'step_00000004'))
    fit(resumed)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and resumed.dls.train.size_counts == whole.dls.train.size_counts


def test_sizes_that_the_model_cannot_halve_are_refused(tmp_path):
    for change, said in (('data.buckets=[16x16,22x16]', "data.buckets: found ['22x16']"), ('data.buckets=[16x16,32x32]', 'the same shape'),
                         ('data.buckets=[16by16]', 'is no size'), ('data.buckets=[auto]', 'data.bucket_step: found 2'), ('data.bucket_step=4', 'only data.buckets')):
        with pytest.raises(RecipeError) as e: recipe_of(tmp_path, change)
        assert said in str(e.value), e.value
    found = recipe_of(tmp_path, 'data.image_size=64', 'data.buckets=[auto]').data.sizes
    assert (64, 64) in found and (80, 48) in found and all(w*h <= 64*64 for w, h in found) and min(kept_share(s, (64, 64)) for s in found) > .5

"A sweep over length of average and guidance: its cells, its files, an interruption, and its refusals."
import csv, json

import numpy as np, pytest, torch
from PIL import Image
from mdm.cli.evaluate import mdm_evaluate
from mdm.data.shapes import shapes_captions, write_shapes
from mdm.evaluation import sweep as module
from mdm.evaluation.evaluate import EvaluateConfig
from mdm.evaluation.sweep import SweepConfig, sweep, sweep_png, sweep_rows
from mdm.models.nested_unet import create_model
from mdm.recipe import load_recipe, save_recipe
from mdm.training.averages import reconstruct_average
from safetensors.torch import save_file
from tiny_models import small

captions = shapes_captions(6)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "What a training of a tiny model with power-function averages leaves."
    folder, recipe = tmp_path_factory.mktemp('run'), load_recipe('shapes', small)
    torch.manual_seed(0)
    for step in (10, 20):
        model = create_model(recipe.model, 16)
        for p in model.parameters(): torch.nn.init.normal_(p, std=.05)
        (where := folder/'averages'/f'step_{step:08d}').mkdir(parents=True)
        for width in (.05, .1): save_file({k: v*(1 + width) for k, v in model.state_dict().items()}, where/f'power_{width}.safetensors')
        save_recipe(recipe, where/'recipe.yaml')
    return folder


def test_every_cell_is_drawn_with_its_average_and_guidance(run, tmp_path):
    cells = sweep(run, tmp_path, SweepConfig([.05, .15], [1., 3.]), captions, wishes=dict(steps=1), device='cpu')
    assert [(o['width'], o['guidance']) for o in cells.values()] == [(.05, 1.), (.05, 3.), (.15, 1.), (.15, 3.)]
    for name, o in cells.items():
        settings = json.loads((tmp_path/name/'run.json').read_text())['settings']
        assert settings['guidance'] == o['guidance'] and settings['steps'] == 1 and o['scores']['crisp']['n'] == 6
        pipe = module.average_pipeline(run, o['width'], device='cpu')
        want = reconstruct_average(run, o['width'])
        assert all(torch.allclose(v, want[k]) for k, v in pipe.model.state_dict().items())
        first = np.asarray(Image.open(tmp_path/name/'pictures'/'000000.png')).astype(int)
        again = np.asarray(pipe(captions[0], n=1, seed=0, steps=1, guidance=o['guidance'])[0]).astype(int)
        assert abs(first - again).max() <= 1
    rows = list(csv.DictReader(open(tmp_path/'sweep.tsv'), delimiter='\t'))
    assert [(r['width'], r['guidance']) for r in rows] == [('0.05', '1'), ('0.05', '3'), ('0.15', '1'), ('0.15', '3')]
    assert float(rows[2]['crisp']) == pytest.approx(cells['width_0.15_guidance_1']['scores']['crisp']['value'], rel=1e-5)
    assert Image.open(tmp_path/'sweep.png').width > 400


def test_a_sweep_goes_on_cell_by_cell(run, tmp_path, monkeypatch):
    done, real = [], module.evaluate
    def stop(pipe, folder, *args):
        if len(done) == 1: raise KeyboardInterrupt
        done.append(folder.name)
        return real(pipe, folder, *args)
    monkeypatch.setattr(module, 'evaluate', stop)
    go = lambda grid: sweep(run, tmp_path, grid, captions, wishes=dict(steps=1), device='cpu')
    with pytest.raises(KeyboardInterrupt): go(SweepConfig([.05], [1., 2.]))
    assert done == ['width_0.05_guidance_1']
    monkeypatch.setattr(module, 'evaluate', lambda pipe, folder, *args: done.append(folder.name) or real(pipe, folder, *args))
    go(SweepConfig([.05], [1., 2., 3.]))                                     # the finished one is not drawn again; one more is
    assert done == ['width_0.05_guidance_1', 'width_0.05_guidance_2', 'width_0.05_guidance_3']
    go(SweepConfig([.05], [1., 2., 3.]))
    assert len(done) == 3
    with pytest.raises(FileExistsError, match='steps: 1 there, 2 now'): sweep(run, tmp_path, SweepConfig([.05], [1.]), captions, wishes=dict(steps=2), device='cpu')


def test_the_heat_map_marks_the_best_cell():
    score = lambda v, better: dict(value=v, se=.1, n=9, better=better)
    cells = {f'{w} {g}': dict(width=w, guidance=g, scores={'fid': score(abs(w - .1)*100 + abs(g - 2), 'low'), 'crisp': score(g, 'high')}) for w in (.05, .1) for g in (1., 2., 4.)}
    widths, guidances, values, best, better = module._matrix(cells, 'fid')
    assert (widths, guidances, better, tuple(best)) == ([.05, .1], [1., 2., 4.], 'low', (1, 1)) and values.shape == (2, 3)
    assert tuple(module._matrix(cells, 'crisp')[3]) == (0, 2) and sweep_png(cells)[:4] == b'\x89PNG'
    del cells['0.05 1.0']
    assert np.isnan(module._matrix(cells, 'fid')[2][0, 0]) and len(sweep_rows(cells)) == 6 and sweep_png(cells)


def test_the_command(run, tmp_path, capsys):
    (tmp_path/'captions.txt').write_text('\n'.join(captions[:2]))
    args = ['--sweep', str(run), '--captions', str(tmp_path/'captions.txt'), '--guidances', '1', '2', '--widths', '0.1', '--steps', '1', '--device', 'cpu', '--loss-pictures', '0']
    assert mdm_evaluate([*args, '--output', str(tmp_path/'out')]) == 0
    out = capsys.readouterr().out
    assert 'sweep.png: heat maps' in out and len([o for o in out.splitlines() if o.startswith('  0.1')]) == 2
    for more, said in ((['--raw'], '--sweep makes averages'), (['--widths', '0.5'], 'sweep.widths[0]: found 0.5'), (['--guidances', '2', '2'], 'no number twice')):
        assert mdm_evaluate([*args, *more, '--output', str(tmp_path/'other')]) == 2
        assert said in capsys.readouterr().err
    assert mdm_evaluate(['--sweep', str(tmp_path), *args[2:]]) == 2 and 'train.power_ema' in capsys.readouterr().err


def test_fid_of_a_cell(run, tmp_path):
    "With real pictures and a network for features, the cells have an FID."
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor: return torch.nn.functional.adaptive_avg_pool2d(x.float()/128 - 1, [2, 2]).flatten(1)
    torch.jit.script(Net()).save(str(tmp_path/'net.pt'))
    shards = [str(p) for p in write_shapes(tmp_path/'real', 20, 16)]
    cells = sweep(run, tmp_path/'out', SweepConfig([.05], [1.]), None, shards, EvaluateConfig(fid=str(tmp_path/'net.pt'), loss_pictures=0), dict(steps=1), device='cpu')
    assert next(iter(cells.values()))['scores']['fid']['n'] == 20

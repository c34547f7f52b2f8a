"The edges of `mdm.recipe` that a reader of its notebook need not see."
import json, os
from dataclasses import fields
from pathlib import Path
import pytest, torch
from mdm.models.nested_unet import NestedUNetConfig, create_model, model_scales
from mdm.recipe import Recipe, RecipeError, RecipeFormat, TrainConfig, build_recipe, check_recipe, load_recipe, lost_references, recipe_dict, save_recipe, valid_keys
from mdm.utils.configs import nearest, violations
from mdm.utils.files import presets
from mdm.diffusion.settings import SampleConfig
from mdm.models.unet import UNetConfig

here = Path(__file__).parent
plain = dict(channels=[32, 32], num_resnets=[1, 1], num_attention_layers=[0, 0])
small = dict(name='small', model=plain, data=dict(image_size=16), train=dict(steps=100))

def problems(values, **kwargs):
    with pytest.raises(RecipeError) as e: build_recipe(values, **kwargs)
    assert all(p in str(e.value) for p in e.value.problems)
    return e.value.problems

def with_(place, value, base=small):
    "A copy of `base` with one more value at a dotted place."
    out = d = json.loads(json.dumps(base))
    *path, last = place.split('.')
    for k in path: d = d.setdefault(k, {})
    d[last] = value
    return out

def nested(**kwargs): return with_('model', dict(plain, time_dim=128, inner=plain) | kwargs, with_('data.image_size', 32))

# ---- presets

def test_presets_are_those_promised():
    assert presets() == ['cc12m_1024x1024', 'cc12m_256x256', 'cc12m_64x64', 'emoji', 'emoji_32', 'imagenet_64', 'moving_shapes',
                         'moving_shapes_1', 'moving_shapes_16', 'moving_shapes_4', 'pictures_64', 'shapes']

@pytest.mark.parametrize('name', presets())
def test_preset_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.train.output == f'runs/{name}'
    assert load_recipe(save_recipe(recipe, tmp_path/'r.yaml')) == recipe
    assert build_recipe(recipe_dict(recipe)) == recipe

def test_writing_a_recipe_leaves_the_earlier_one_until_it_is_whole(tmp_path, monkeypatch):
    recipe, path = load_recipe('shapes'), tmp_path/'r.yaml'
    save_recipe(recipe, path); before = path.read_bytes()
    with monkeypatch.context() as m:
        def full(*args): raise OSError(28, 'No space left on device')
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space'): save_recipe(recipe, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

def test_preset_sizes():
    def scales_and_size(n): return model_scales((r := load_recipe(n)).model), r.data.image_size
    assert scales_and_size('shapes') == ([2, 1], 32) and scales_and_size('pictures_64') == ([2, 1], 64)
    with torch.device('meta'): model = create_model(load_recipe('pictures_64').model, 256)
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 20e6

@pytest.mark.parametrize('size', ['64x64', '256x256', '1024x1024'])
def test_released_presets_build_the_released_models(size):
    golden = json.loads((here/'golden'/f'cc12m_{size}.json').read_text())
    with torch.device('meta'): model = create_model(load_recipe(f'cc12m_{size}').model, 2048)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == golden['state']

# ---- types, keys, suggestions

def test_all_problems_at_once():
    bad = problems(dict(small, model=dict(plain, num_resnets=[1]), train=dict(steps=5, warmup_steps=9, lr='x'), sample=dict(stpes=3), batch_size=1, data=dict(image_size='16'), text=3))
    for place in ('model.num_resnets', 'train.lr', 'sample.stpes', 'batch_size', 'data.image_size', 'text: found 3'): assert any(p.startswith(place) for p in bad), place
    assert not any(p.startswith('model.channels') for p in bad)

def leaves(d, place=''):
    for k, v in d.items():
        if isinstance(v, dict) and k != 'micro_conditioning': yield from leaves(v, f'{place}{k}.')
        else: yield f'{place}{k}', v

@pytest.mark.parametrize('name', ['shapes', 'cc12m_64x64'])
def test_every_value_is_checked_and_every_key_suggested(name):
    values = recipe_dict(load_recipe(name))
    depth = len(model_scales(load_recipe(name).model)) - 1
    for place, value in leaves(values):
        wrong = {'x': 'y'}
        assert any(p.startswith(f'{place}') for p in problems(with_(place, wrong, values))), place
        if place != 'name' and place[:-1] not in valid_keys(depth): assert nearest(place[:-1], valid_keys(depth)) in (place, *(k for k in valid_keys(depth) if k.split('.')[-1] == place.split('.')[-1])), place

@pytest.mark.parametrize('place,value,expected', [
    ('train.batch_size', '8', 'a valid integer'), ('train.batch_size', 8.5, 'integer'), ('train.batch_size', True, 'integer'), ('train.batch_size', None, 'integer'), ('train.bf16', 1, 'boolean'),
    ('train.lr', float('nan'), 'number'), ('train.lr', float('inf'), 'finite'), ('train.lr', 0, 'greater than 0'), ('train.betas', [.9], 'missing'), ('train.betas', [.9, 1.], 'less than 1'), ('train.optimizer', 'sdg', "'adamw', 'adam', 'muon' or 'adamw8bit'"),
    ('train.preview_prompts', 'a dog', 'list'), ('train.preview_prompts', [1], 'string'), ('model.channels', [32, '32'], 'integer'), ('model.micro_conditioning', {'scale': 'x'}, 'number'), ('train', 0, 'mapping'), ('model', None, 'mapping'), ('model', [1], 'mapping'),
    ('name', 3, 'string'), ('diffusion.schedule', 'linear', "'deepfloyd'"), ('sample.threshold', 'hard', "'dynamic'"), ('data.crop', 'left', "'center' or 'random'")])
def test_types(place, value, expected):
    assert any(p.startswith(place) and expected in p for p in problems(with_(place, value))), problems(with_(place, value))

def test_empty_section_and_numbers():
    assert build_recipe(dict(small, sample=None)).sample == build_recipe(small).sample
    assert build_recipe(with_('train.lr', 1)).train.lr == 1. and build_recipe(with_('train.grad_clip', None)).train.grad_clip is None

def test_inner_decides_the_kind():
    assert type(build_recipe(small).model) is UNetConfig
    two = build_recipe(with_('model.inner', dict(plain, time_dim=128, inner=plain), with_('data.image_size', 64, nested()))).model
    assert isinstance(two, NestedUNetConfig) and isinstance(two.inner, NestedUNetConfig) and type(two.inner.inner) is UNetConfig and model_scales(two) == [4, 2, 1]
    assert any('model.inner: found None' in p for p in problems(with_('model.inner', None)))
    assert 'only a nested model' in problems(with_('model.freeze_inner', True))[0]
    assert 'did you mean model.inner.channels?' in problems(nested(inner=dict(plain, chanels=[1])))[0]

# ---- combinations

@pytest.mark.parametrize('place,value,expected', [
    ('model.num_resnets', [1], '2 entries'), ('model.num_resnets', [0, 1], 'at least 1'), ('model.num_attention_layers', [0, 0, 0], '2 entries'), ('model.num_attention_layers', [0, -1], '0 or more'),
    ('model.channels', [32, 33], 'multiples'), ('model.channels', [32, 0], 'above 0'), ('model.channels', [], 'at least one level'), ('model.num_groups', 0, 'above 0'), ('model.num_heads', 7, 'divisor'), ('model.num_heads', 0, 'divisor'),
    ('model.time_dim', 20, 'multiple of 8'), ('model.text_proj_dim', 0, 'or null'), ('model.num_text_layers', -1, '0 or more'), ('model.dropout', 1., 'below 1'), ('model.micro_conditioning', {'scale': 0}, 'above 0'),
    ('diffusion.multi_res_weights', [2., 1.], '1 entry'), ('diffusion.mixed_ratio', [2, 1], '1 entry'), ('diffusion.multi_res_weights', [-1], 'below 0'), ('diffusion.mixed_ratio', [0], 'above 0'),
    ('diffusion.num_steps', 1, 'at least 2'), ('diffusion.beta_start', 0, 'between'), ('diffusion.beta_end', 1e-5, 'beta_start'), ('diffusion.rescale_signal', 0, 'above 0'), ('diffusion.output_scale', -1, '0'),
    ('text.dim', 0, 'above 0'), ('text.max_tokens', 0, 'above 0'), ('data.image_size', 17, 'multiple of 2'), ('data.image_size', 4, 'at least 8'), ('data.image_size', 0, 'above 0'), ('data.workers', -1, '0 or more'), ('data.shuffle', -1, '0 or more'), ('data.epoch_size', 0, 'above 0'), ('data.weights', [1.0], 'each of the 0 entries'),
    ('train.warmup_steps', 101, 'no more than train.steps = 100'), ('train.warmup_steps', -1, 'greater'), ('train.lr', -1e-3, 'greater than 0'), ('train.ema_decay', 1., 'less than 1'), ('train.caption_dropout', -.1, 'greater'),
    ('sample.steps', 1001, 'up to diffusion.num_steps = 1000'), ('sample.steps', 0, 'greater than or equal to 1'), ('sample.eta', -1., 'greater than or equal to 0'), ('sample.guidance', -1., 'greater than or equal to 0'),
    ('sample.guidance_rescale', 1.1, 'less than or equal to 1'), ('sample.guidance_interval', [.5, .5], 'the smaller one first'),
    ('sample.solver', 'euler', "'ddim', 'ddpm', 'dpm++2m', 'unipc' or 'consistency'"), ('sample.spacing', 'karras', "'uniform', 'trailing' or 'logsnr'")])
def test_combinations(place, value, expected):
    bad = problems(with_(place, value))
    assert any(p.startswith(f'{place}: found ') and expected in p for p in bad), bad

@pytest.mark.parametrize('change,place,expected', [
    (dict(channels=[32], num_resnets=[1], num_attention_layers=[0]), 'model.channels', 'two levels'), (dict(mid_blocks=True), 'model.mid_blocks', 'false'), (dict(pooled_text=True), 'model.pooled_text', 'false'),
    (dict(text_proj_dim=8), 'model.text_proj_dim', 'innermost'), (dict(num_text_layers=1), 'model.num_text_layers', 'innermost'), (dict(masked_cross_attention=False), 'model.masked_cross_attention', 'innermost'),
    (dict(freeze_inner=True), 'model.freeze_inner', 'model.inner_from'), (dict(time_dim=64), 'model.time_dim', '128, as in'), (dict(inner=dict(plain, num_groups=64)), 'model.inner.channels', 'multiples of model.inner.num_groups')])
def test_combinations_of_networks(change, place, expected):
    assert build_recipe(nested())
    bad = problems(nested(**change))
    assert len(bad) == 1 and bad[0].startswith(place) and expected in bad[0], bad

def test_eta_belongs_to_ddim():
    assert 'only sample.solver' in problems({**nested(), 'sample': dict(solver='unipc', eta=.5)})[0]
    assert build_recipe({**nested(), 'sample': dict(eta=None, steps=7)}).sample == SampleConfig(steps=7, solver='ddpm')      # recipes of old
    assert build_recipe({**nested(), 'sample': dict(eta=None, solver='unipc')}).sample.solver == 'unipc'

def test_what_is_allowed():
    assert build_recipe(nested(freeze_inner=True, inner_from='a.pth')).model.freeze_inner
    assert build_recipe(nested(time_dim=64, inner=dict(plain, pooled_text=False))).model.time_dim == 64
    assert build_recipe(with_('diffusion.mixed_ratio', [1, 1], nested())).diffusion.mixed_ratio == [1., 1.]

def test_mixed_ratio_leaves_a_sample():
    base = with_('diffusion.mixed_ratio', [1, 15], nested())
    assert build_recipe(with_('train.batch_size', 16, base))
    assert problems(with_('train.batch_size', 15, base))[0].startswith('train.batch_size: found 15, expected more')

def test_text_layers_need_eight_heads():
    base = with_('model.num_text_layers', 1, small)
    assert 'text.dim' in problems(with_('text.dim', 12, base))[0]
    assert build_recipe(with_('text.dim', 16, base)) and build_recipe(with_('text.encoder', 'google/flan-t5-small', with_('text.dim', 12, base)))

# ---- files and overrides

def load_text(text, tmp_path, overrides=()):
    (tmp_path/'mine.yaml').write_text(text, encoding='utf-8')
    return load_recipe(tmp_path/'mine.yaml', overrides)

tiny = 'model: {channels: [32, 32], num_resnets: [1, 1], num_attention_layers: [0, 0]}\ndata: {image_size: 16}\n'

def test_minimal_file(tmp_path):
    r = load_text(tiny, tmp_path)
    assert r.name == 'mine' and r.train.steps == 10_000
    assert load_text(tiny + 'train: {lr: 1e-4}', tmp_path).train.lr == 1e-4                       # no point needed
    assert load_text(tiny + 'train: {output: "out/${name}-${data.image_size}"}', tmp_path, ['name=a']).train.output == 'out/a-16'

@pytest.mark.parametrize('text,says', [('', 'mapping of sections'), ('- 1\n- 2', 'mapping of sections'), ('a: [1', 'line'), (tiny + 'train: {steps: 1, steps: 2}', 'duplicate key'),
    (tiny + 'train: {output: "${nothing}"}', 'nothing'), (tiny + 'train: {steps: "???"}', "train.steps: found '???'"), ('data: {image_size: 16}', 'model: missing'), (tiny + 'train: {output: "${"}', 'mine.yaml')])
def test_bad_files(text, says, tmp_path):
    with pytest.raises(RecipeError) as e: load_text(text, tmp_path)
    assert says in str(e.value) and 'mine.yaml' in str(e.value)

def test_no_such_preset():
    with pytest.raises(FileNotFoundError, match=r"'cc12m_64'; did you mean cc12m_64x64\? Presets: cc12m_1024x1024, "): load_recipe('cc12m_64')
    with pytest.raises(FileNotFoundError, match='nowhere.yaml'): load_recipe('nowhere.yaml')

def test_overrides(tmp_path):
    r = load_text(tiny, tmp_path, ['train.lr=1e-3', 'train.preview_prompts=["a = b", c]', 'train.grad_clip=null', 'model.channels[0]=64', 'data.files=[a.tar, b.tar]', 'train.output=a=b', 'train.bf16=true', 'name=x'])
    assert (r.train.lr, r.train.preview_prompts, r.train.grad_clip, r.model.channels, r.data.files, r.train.output, r.train.bf16, r.name) == (1e-3, ['a = b', 'c'], None, [64, 32], ['a.tar', 'b.tar'], 'a=b', True, 'x')
    assert load_text(tiny, tmp_path, 'train.steps=7').train.steps == 7                            # a lone string is one override

@pytest.mark.parametrize('override,says', [('train.lr', "override 'train.lr': expected key=value"), ('=3', "override '=3'"), ('train.lrr=3', 'did you mean train.lr?'), ('lr=3', 'did you mean train.lr?'), ('trian.lr=3', 'trian: unknown key'),
    ('model.channels[9]=3', "override 'model.channels[9]=3'"), ('train.lr=[1', "override 'train.lr=[1'"), ('train.lr.x=3', "train.lr: found {'x': 3}"), ('model.inner=3', 'model.inner'), ('model.channels=32', 'model.channels: found 32, expected a valid list')])
def test_bad_overrides(override, says, tmp_path):
    with pytest.raises(RecipeError) as e: load_text(tiny, tmp_path, [override])
    assert says in str(e.value), str(e.value)

def test_bad_overrides_together(tmp_path):
    with pytest.raises(RecipeError) as e: load_text(tiny, tmp_path, ['train.lr', 'train.stps=1', 'data.image_size=15'])
    assert len(e.value.problems) == 3

def test_strings_come_back_as_they_were(tmp_path):
    recipe = build_recipe(small)
    recipe.train.preview_prompts = ['${name}', 'yes', '1e3', 'null', 'a: b', 'é \u4e2d', '- x', '', "it's \"q\"", 'line\nbreak', '2024-01-01', '0x1F', '???', '.5e3', '-1E-3', '1_0', '1:30', '~', '=', r'\d', '12e']
    recipe.name = '12'
    assert load_recipe(save_recipe(recipe, tmp_path/'r.yaml')) == recipe

def test_every_setting_is_documented():
    from fastcore.docments import docments
    for section in (Recipe, TrainConfig): assert all(docments(section).get(f.name) for f in fields(section))

@pytest.mark.parametrize('values, key, want', [
    (dict(lr_schedule='one_cycle', warmup_steps=5), 'warmup_steps', 'warm-up of its own'),
    (dict(ema_decay=.9, ema_decays=[.99, .9]), 'ema_decays', 'differ'), (dict(ema_decays=[.5, .5]), 'ema_decays', 'differ'), (dict(freeze_inner_steps=5), 'freeze_inner_steps', 'model.inner_from')])
def test_training_options_that_exclude_each_other(values, key, want):
    train = TrainConfig(**values)
    found = violations(train, 'train') + check_recipe(model=UNetConfig([8], [1], [0], num_groups=8), train=train)
    assert len(found) == 1 and found[0].startswith(f'train.{key}: ') and want in found[0]

@pytest.mark.parametrize('name', 'sgd rmsprop radam qhadam larc lamb ranger'.split())
def test_optimizers_that_went(name): assert 'train.optimizer' in problems(with_('train.optimizer', name))[0]

def test_each_problem_is_reported_once():
    wrong = dict(small, model=dict(plain, num_resnets=[1], time_dim=20, inner=dict(plain, channels=[32, 33])), train=dict(steps=5, warmup_steps=9))
    found = problems(wrong)
    assert len(found) == len(set(found)) and len({p.partition(':')[0] for p in found}) == len(found)

def test_other_formats(tmp_path, monkeypatch):
    "A file in another format is translated, checked leniently, and overridden; its problems are reported with ours."
    translate = lambda values, name: ({'model': dict(plain, channels='no' if values['bad'] else plain['channels']), 'data': {'image_size': '16'}}, ['a: bad'] if values['bad'] else [])
    monkeypatch.setattr('mdm.recipe.recipe_formats', [RecipeFormat(lambda values: 'bad' in values, translate)])
    assert load_text('bad: false\nbad: false', tmp_path, ['train.steps=7']).train.steps == 7          # theirs may repeat a key
    with pytest.raises(RecipeError) as e: load_text('bad: true', tmp_path, ['train.stps=7'])
    assert [p.partition(':')[0] for p in e.value.problems] == ['a', 'model.channels', 'train.stps']
    with pytest.raises(RecipeError, match='trian: unknown key'): load_text(tiny + 'trian: {}', tmp_path)

# ---- recipes from elsewhere

@pytest.mark.parametrize('at', ['data: {image_size: 16, files: ["http://host/X.tar"]}', 'data: {image_size: 16}\ntrain: {output: "runs/X"}', 'data: {image_size: 16}\nname: X', 'data: {image_size: 16}\nsample: {solver: X}'])
@pytest.mark.parametrize('reference', ['${oc.env:MDM_TEST_SECRET}', '${oc.env:MDM_TEST_SECRET,x}', '${ oc.env:MDM_TEST_SECRET }', r'\\${oc.env:MDM_TEST_SECRET}', '${oc.decode:${oc.env:MDM_TEST_SECRET}}', '${oc.select:name}'])
def test_a_recipe_file_reads_no_environment(at, reference, tmp_path, monkeypatch):
    monkeypatch.setenv('MDM_TEST_SECRET', 'hush')
    text = tiny.partition('\n')[0] + '\n' + at.replace('"', "'").replace('X', reference if "'" in at or '"' in at else f"'{reference}'")
    with pytest.raises(RecipeError) as e: load_text(text, tmp_path)
    assert 'hush' not in str(e.value) and 'environment' in str(e.value)

def test_an_override_replaces_a_reference_that_is_refused(tmp_path):
    text = tiny + 'train: {output: "${oc.env:HOME}/runs"}'
    assert load_text(text, tmp_path, ['train.output=mine']).train.output == 'mine'

def test_environment_on_the_command_line_is_used_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv('MDM_TEST_SECRET', 'hush'); monkeypatch.setenv('MDM_TEST_STEPS', '7')
    changes = ['data.files=["http://${oc.env:MDM_TEST_SECRET}@a/1.tar", b.tar]', 'name=x${oc.env:MDM_TEST_SECRET}', 'train.steps=${oc.decode:${oc.env:MDM_TEST_STEPS}}']
    recipe = load_text(tiny + 'train: {output: "runs/${name}"}', tmp_path, changes)
    assert (recipe.data.files, recipe.train.output, recipe.train.steps) == (['http://hush@a/1.tar', 'b.tar'], 'runs/xhush', 7)
    again = load_recipe(save_recipe(recipe, tmp_path/'r.yaml'))
    assert b'hush' not in (tmp_path/'r.yaml').read_bytes() and recipe_dict(again) == recipe_dict(recipe) and 'hush' not in str(recipe_dict(recipe))
    assert again.train.output == 'runs/x${oc.env:MDM_TEST_SECRET}' and again.train.steps == 7
    assert len(lost_references(again)) == 3 and 'data.files[0]=' in lost_references(again)[-3] + lost_references(again)[-2] + lost_references(again)[-1]
    recipe.train.output = 'elsewhere'
    assert recipe_dict(recipe)['train']['output'] == 'elsewhere'

def test_a_value_of_the_environment_is_no_reference(tmp_path, monkeypatch):
    monkeypatch.setenv('MDM_TEST_SECRET', '${name} ${oc.env:HOME}')
    assert load_text(tiny, tmp_path, ['train.output=${oc.env:MDM_TEST_SECRET}']).train.output == '${name} ${oc.env:HOME}'

laughs = 'a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n' + '\n'.join(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"]*10)}]' for i in range(1, 12))
doubled = 'name: x\n' + 'model:\n' + '  a0: y\n' + '\n'.join(f'  a{i}: "${{model.a{i - 1}}}${{model.a{i - 1}}}"' for i in range(1, 60))
multiplied = 'name: x\n' + 'model:\n' + '  a0: y\n' + '\n'.join(f'  a{i}: ["${{model.a{i - 1}}}", "${{model.a{i - 1}}}"]' for i in range(1, 49))

@pytest.mark.parametrize('text,says', [('model: ' + '['*3000, 'nested'), ('model: ' + '{a: '*3000 + '1' + '}'*3000, 'nested'), ('\n'.join(' '*i + 'a:' for i in range(3000)), 'nested'), ('[' * 3000 + ']'*3000, 'nested'),
    (laughs, 'more than 200,000 values'), ('model: &a [*a]', 'holds itself'), (doubled, 'references'), (multiplied, 'references'), ('model: {a: "${model}"}', 'refers to itself'), ('name: "${name}"', 'refers to itself'), ('\0', 'mine.yaml'), ('name: ' + '9'*5000, 'digits')])
def test_hostile_yaml_is_refused_at_once(text, says, tmp_path):
    with pytest.raises(RecipeError) as e: load_text(text, tmp_path)
    assert says in str(e.value) and len(str(e.value)) < 3000, str(e.value)[:500]

def test_hostile_overrides_are_refused(tmp_path):
    for o in ('name=' + '['*3000, 'data.files=[' + '{a: '*500 + '1' + '}'*500 + ']', 'a' + '.b'*3000 + '=1', 'name=${name}'):
        with pytest.raises(RecipeError): load_text(tiny, tmp_path, [o])

def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path/'a.yaml').write_bytes(b'name: \xff\xfe')
    with pytest.raises(RecipeError, match='a.yaml'): load_recipe(tmp_path/'a.yaml')
    with open(tmp_path/'b.yaml', 'wb') as f: f.truncate(10**11)
    with pytest.raises(RecipeError, match='b.yaml'): load_recipe(tmp_path/'b.yaml')

def test_plain_references_of_all_kinds(tmp_path):
    text = tiny + 'train: {steps: 7, warmup_steps: "${.steps}", output: "${name}/${data.image_size}/${..name}", preview_prompts: ["${train.output}", "\\\\${x}"]}'
    train = load_text(text, tmp_path).train
    assert (train.warmup_steps, train.output, train.preview_prompts) == (7, 'mine/16/mine', ['mine/16/mine', '${x}'])
    assert load_text(tiny, tmp_path, ['train.output=runs/${name}']).train.output == 'runs/mine'
    assert load_text(tiny, tmp_path, ['train={steps: 3, lr: 1e-3}', 'train.betas=[0.5, 0.6]', 'train.betas[-1]=0.7']).train.betas == (.5, .7)

# ---- numbers and trials

def test_no_number_is_beyond_a_computer():
    values, places = recipe_dict(load_recipe('cc12m_256x256')), []
    for section in ('train', 'data', 'text', 'diffusion', 'sample'):
        for k, v in values[section].items():
            if type(v) is not int or k == 'frames': continue         # frames have a rule of their own, which is told first
            values[section][k] = 10**23
            places.append(f'{section}.{k}')
    bad = problems(values)
    assert len(places) > 15 and [o for o in places if not any(p.startswith(o) for p in bad)] == []
    values['data']['frames'] = 10**23
    assert any(p.startswith('data.frames: found') for p in problems(values))
    assert any(p.startswith('model.num_resnets') for p in problems(with_('model.num_resnets', [1, 10**23])))

def test_batch_size_of_the_issue(): assert 'train.batch_size' in problems(with_('train.batch_size', 10**23))[0] and 'train.batch_size' in problems(with_('train.batch_size', 2**30))[0]

def test_a_short_trial_shortens_the_warm_up(tmp_path):
    with pytest.warns(UserWarning, match='train.steps=10 is less than train.warmup_steps = 20, which is therefore lowered to 1'): recipe = load_recipe('shapes', ['train.steps=10'])
    assert (recipe.train.steps, recipe.train.warmup_steps) == (10, 1)
    with pytest.warns(UserWarning, match='sample.steps'): assert load_recipe('shapes', ['diffusion.num_steps=5']).sample.steps == 5
    with pytest.raises(RecipeError, match='train.warmup_steps: found 60'): load_recipe('shapes', ['train.steps=10', 'train.warmup_steps=60'])
    with pytest.raises(RecipeError, match='train.warmup_steps: found 9'): load_text(tiny + 'train: {steps: 5, warmup_steps: 9}', tmp_path)
    with pytest.raises(RecipeError, match='train.warmup_steps: found 99'): load_text(tiny + 'train: {steps: 5}', tmp_path, ['train.warmup_steps=99'])
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_recipe('shapes', ['train.steps=100']).train.warmup_steps == 20

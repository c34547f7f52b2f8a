"Fine-tuning: adapters that peft reads and that resume bit for bit, networks that stay frozen, and mistakes."
import shutil
import pytest, torch
from safetensors.torch import load_file
from mdm.checkpoint import find_adapter, load_checkpoint, load_model, save_checkpoint
from mdm.data.shapes import write_shapes
from mdm.models.adapters import merge_adapters, spare_frozen
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import DistillConfig, RecipeError, load_recipe, recipe_dict
from mdm.training.distill import distill_recipe, distill_training
from mdm.training.learner import build_model
from mdm.training.finetune import finetune_recipe, write_prior
from mdm.training.run import run_training
from tiny_models import same, tiny

few = ['train.steps=6', 'train.batch_size=2', 'train.save_every=3', 'train.keep=5', 'train.preview_prompts=[]', 'train.log_every=2', 'data.shuffle=4']
lora = ['finetune.rank=2', 'finetune.networks=[16]']

@pytest.fixture(scope='module')
def data(tmp_path_factory): return [str(p) for p in write_shapes(tmp_path_factory.mktemp('data'), 12, 32, per_shard=12)]

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    recipe, folder = load_recipe('shapes', tiny), tmp_path_factory.mktemp('base')/'model'
    torch.manual_seed(0)
    model = create_model(recipe.model, 8)
    for p in model.parameters(): torch.nn.init.normal_(p, std=.05)
    return save_checkpoint(folder, recipe, model.state_dict(), model.state_dict(), 10)

def train(base, data, out, *changes, **kwargs):
    return run_training(finetune_recipe(base, [*few, f'train.output={out}', *changes], data), **kwargs)

@pytest.fixture(scope='module')
def adapter(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'run'
    learn = train(base, data, out, *lora)
    return learn, out

def test_adapter_changes_one_network(adapter, base):
    learn, out = adapter
    before, after = load_model(base)[0].state_dict(), load_model(out)[0].state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(k.startswith('inner_unet.') for k in changed)
    saved = load_file(out/'step_00000006'/'adapter_model.safetensors')
    assert all('.lora_' in k for k in saved)
    assert sum(v.numel() for v in saved.values()) < .5*sum(v.numel() for v in before.values())

def test_averages_share_what_is_frozen(adapter):
    learn, _ = adapter
    mine, average = dict(learn.model.named_parameters()), dict(learn.moving_average.model.named_parameters())
    for name, p in mine.items(): assert (average[name].data_ptr() == p.data_ptr()) == (not p.requires_grad), name

def test_one_copy_of_what_is_frozen(adapter, base, data, tmp_path):
    "The frozen weights are those of the file, in float32 also where the file has half of it."
    learn, _ = adapter
    places = [p.data_ptr() for p in learn.model.parameters() if not p.requires_grad]
    assert max(places) - min(places) < (base/'model.safetensors').stat().st_size
    recipe, state = load_recipe('shapes', tiny), load_model(base)[0].state_dict()
    half = save_checkpoint(tmp_path/'half', recipe, {k: v.half() for k, v in state.items()})
    tuned = build_model(finetune_recipe(half, lora, data), 8)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert torch.equal(tuned.conv_in.weight, state['conv_in.weight'].half().float())
    assert sum(len(o) for o in learn.opt.param_lists) == sum(p.requires_grad for p in learn.model.parameters())

@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_frozen_layers_keep_less_and_give_the_same_gradients(base, bf16, memory):
    model = load_model(base)[0].to(memory_format=memory)
    for name, p in model.named_parameters(): p.requires_grad_('kv_cond' in name)
    x, t, words = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)], torch.tensor([10, 600]), torch.randn(2, 3, 8)
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
    for checkpointing in (False, True, False):
        if len(found) == 2: spare_frozen(model)
        kept = {}
        model.activation_checkpointing, _ = checkpointing, model.zero_grad()
        def keep(o): kept[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes(); return o
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda o: o), torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = sum(o.square().mean() for o in model(x, t, words))
        loss.backward()
        found.append(([p.grad.clone() for p in model.parameters() if p.requires_grad], sum(n for k, n in kept.items() if k not in own)))
    assert all(torch.equal(a, b) and torch.equal(a, c) and a.abs().sum() > 0 for a, b, c in zip(*(grads for grads, _ in found)))
    assert found[2][1] < .85*found[0][1]

@pytest.mark.parametrize('more', [[], ['finetune.dora=true'], ['train.optimizer=muon', 'train.ema_decays=[0.5]'], ['train.ema_dtype=bfloat16']], ids=['lora', 'dora', 'muon', 'bfloat16'])
def test_resume_is_exact(base, data, tmp_path, more):
    train(base, data, tmp_path/'whole', *lora, *more)
    whole = load_checkpoint(tmp_path/'whole')
    shutil.copytree(tmp_path/'whole', tmp_path/'parts')
    shutil.rmtree(tmp_path/'parts'/'step_00000006')
    train(base, data, tmp_path/'parts', *lora, *more, resume=True)
    parts = load_checkpoint(tmp_path/'parts')
    assert (whole.step, parts.step) == (6, 6)
    for name in ('raw', 'adapter_model', 'optimizer'): assert same(whole.tensors(name), parts.tensors(name)), name

def test_peft_reads_the_adapter(adapter, base):
    from peft import PeftModel
    learn, out = adapter
    model, recipe = load_model(base)
    theirs = PeftModel.from_pretrained(model, out/'step_00000006').eval()
    x, t, words = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)], torch.tensor([10, 600]), torch.randn(2, 3, 8)
    with torch.no_grad():
        for a, b in zip(theirs(x, t, words), load_model(out)[0](x, t, words)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

def test_chosen_networks_learn(base, data, tmp_path):
    train(base, data, tmp_path/'run', 'finetune.networks=[16]', 'train.ema_decay=0')
    before, after = load_model(base)[0].state_dict(), load_model(tmp_path/'run', raw=True)[0].state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(k.startswith('inner_unet.') for k in changed)
    train(base, data, tmp_path/'all')
    after = load_model(tmp_path/'all', raw=True)[0].state_dict()
    assert {k.startswith('inner_unet.') for k in before if not torch.equal(before[k], after[k])} == {True, False}

def test_a_tuned_model_can_be_a_teacher(adapter, base, data, tmp_path):
    "It was refused, with the advice to do what was being done; all tuned weights are the start of the student."
    train(base, data, tmp_path/'whole')
    for teacher in (tmp_path/'whole', adapter[1]):
        out = tmp_path/'student'/teacher.name
        recipe = distill_recipe(teacher, [*few, 'train.lr=1e-30', 'train.steps=1', f'train.output={out}'])
        assert recipe.finetune is None and recipe.data.files == data
        distill_training(recipe)
        learnt = load_model(teacher)[0].state_dict()
        assert same(load_model(out)[0].state_dict(), learnt) and not same(learnt, load_model(base)[0].state_dict())

def test_a_whole_model_resumes(base, data, tmp_path):
    train(base, data, tmp_path/'run')
    wanted = load_checkpoint(tmp_path/'run').tensors('raw')
    shutil.rmtree(tmp_path/'run'/'step_00000006')
    train(base, data, tmp_path/'run', resume=True)
    again = load_checkpoint(tmp_path/'run')
    assert (again.step, same(again.tensors('raw'), wanted)) == (6, True)

def test_pipeline_adds_and_removes(adapter, base):
    _, out = adapter
    pipe = MDMPipeline.from_pretrained(base, device='cpu')
    weights = {k: v.clone() for k, v in pipe.model.state_dict().items()}
    draw = lambda: [o.tobytes() for o in pipe('a red circle', n=1, steps=2)]
    plain = draw()
    pipe.add_adapter(out).add_adapter(out/'step_00000003', .5)
    assert draw() != plain
    assert same(pipe.remove_adapters().model.state_dict(), weights)
    pipe.add_adapter(out, 0.)
    assert draw() == plain
    tuned = MDMPipeline.from_pretrained(out, device='cpu')
    pipe.remove_adapters().add_adapter(out)
    for k, v in tuned.model.state_dict().items(): torch.testing.assert_close(v, pipe.model.state_dict()[k], rtol=1e-5, atol=1e-6)

def test_mistakes(base, data, tmp_path, adapter):
    with pytest.raises(RecipeError, match=r'finetune.networks: found 8, expected sides'): finetune_recipe(base, ['finetune.networks=[8]'], data)
    with pytest.raises(RecipeError, match='finetune.alpha'): finetune_recipe(base, ['finetune.alpha=4'], data)
    with pytest.raises(ValueError, match='name the shards'): finetune_recipe(base)
    with pytest.raises(ValueError, match='choose from'): train(base, data, tmp_path/'a', 'finetune.rank=2', 'finetune.targets=[query]')
    recipe = load_recipe('shapes', tiny)
    recipe.distill = DistillConfig('runs/teacher')
    recipe.train.caption_dropout = 0.
    save_checkpoint(tmp_path/'student', recipe, load_checkpoint(base).weights())
    with pytest.raises(ValueError, match='tune the teacher'): finetune_recipe(tmp_path/'student', [], data)
    broken = tmp_path/'broken'
    broken.mkdir()
    for name in ('adapter_config.json', 'adapter_model.safetensors'): (broken/name).write_bytes((adapter[1]/'step_00000006'/name).read_bytes()[:60])
    with pytest.raises(ValueError, match='damaged'): find_adapter(broken)
    other = create_model(load_recipe('shapes', [*tiny, 'model.inner.channels=[16,16]']).model, 8)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match='Is it an adapter of another model'): merge_adapters(other, [find_adapter(adapter[1])])
    assert same(other.state_dict(), before)

def test_an_adapter_of_an_adapter(adapter, data, tmp_path):
    _, first = adapter
    train(first, data, tmp_path/'second', *lora)
    a, b = load_model(first)[0].state_dict(), load_model(tmp_path/'second')[0].state_dict()
    assert any(not torch.equal(a[k], b[k]) for k in a)

def test_prior_goes_on_after_a_stop(base, tmp_path, monkeypatch):
    words = [f'a red circle {i}' for i in range(5)]
    whole = write_prior(base, words, tmp_path/'whole')
    assert [o['samples'] for o in whole['shards'].values()] == [5] and whole['complete']
    assert write_prior(base, words, tmp_path/'whole')['shards'] == whole['shards']
    with pytest.raises(FileExistsError): write_prior(base, words[:4], tmp_path/'whole')

def test_the_environment_stays_out_of_the_recipe(base, data, monkeypatch):
    monkeypatch.setenv('MDM_SECRET', 'hidden place')
    recipe = finetune_recipe(base, ['train.output=${oc.env:MDM_SECRET}'], data)
    assert recipe.train.output == 'hidden place' and 'hidden' not in str(recipe_dict(recipe))
    assert finetune_recipe(base, [], ['we${ird}/a.tar']).data.files == ['we${ird}/a.tar']
    with pytest.raises(RecipeError, match='train'): finetune_recipe(base, ['train=3'], data)
    with pytest.raises(RecipeError, match='power_ema'): finetune_recipe(base, ['finetune.rank=4', 'train.power_ema=[0.1]'], data)

"What several files of tests share: small models, and learners that train them."
from copy import deepcopy
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
from bench.objectives import even
from mdm.data.loader import create_dls
from mdm.data.shapes import write_shapes
from mdm.models.adapters import adapter_config, adapter_state, add_adapter, choose_layers
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import load_recipe
from mdm.training.learner import mdm_learner

# ---- a model

even_v = [f'diffusion.{o}' for o in even.split()]      # an objective of the reference; with it, an untrained network draws more than grey
tiny = [*even_v, 'model.channels=[8,8]', 'model.inner.channels=[8,8]', 'model.num_resnets=[1,1]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,1]', 'model.num_groups=8', 'model.inner.num_groups=8',
        'model.time_dim=16', 'model.inner.time_dim=16', 'text.dim=8']

@pytest.fixture(scope='module')
def recipe(): return load_recipe('shapes', tiny)

@pytest.fixture(scope='module')
def model(recipe):
    torch.manual_seed(0)
    return create_model(recipe.model, 8)

@pytest.fixture
def state(model): return {k: v.clone() for k, v in model.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

@pytest.fixture(scope='module')
def pipe():
    torch.set_num_threads(1); torch.manual_seed(0)
    recipe = load_recipe('shapes', [*even_v, 'model.channels=[8,8]', 'model.time_dim=32', 'model.num_groups=4', 'model.inner.channels=[8,8]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,0]',
        'model.inner.time_dim=32', 'model.inner.num_groups=4', 'model.inner.num_text_layers=0', 'text.dim=16', 'train.bf16=false', 'sample.steps=6'])
    return MDMPipeline(create_model(recipe.model, recipe.text.dim), recipe, device='cpu')

def write_adapter(folder, model, targets, rank=2, seed=0):
    "A random adapter of a model in a folder, as peft writes one."
    tuned, folder = add_adapter(deepcopy(model), adapter_config(choose_layers(model, None, targets), rank)), Path(folder)
    folder.mkdir(parents=True)
    make = torch.Generator().manual_seed(seed)
    save_file({k: torch.randn(v.shape, generator=make)/3 for k, v in adapter_state(tuned).items()}, folder/'adapter_model.safetensors')
    tuned.adapter.save_pretrained(folder)
    return folder

# ---- a learner

small = '''data.image_size=16 model.channels=[8,16] model.num_groups=8 model.inner.num_groups=8 model.inner.channels=[8,16] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1] model.time_dim=16
    model.inner.time_dim=16 text.dim=16 train.batch_size=4 train.warmup_steps=0 train.preview_prompts=[] data.workers=0 data.shuffle=8 sample.steps=1 train.bf16=false train.lr_schedule=constant train.optimizer=adamw'''.split()

@pytest.fixture(scope='module')
def data(tmp_path_factory): return [str(p) for p in write_shapes(tmp_path_factory.mktemp('data'), 24, 16, per_shard=12)]

@pytest.fixture
def make(data, tmp_path):
    "A learner, with changes to a small recipe."
    def f(*changes, dls=None, cbs=None, **kwargs):
        recipe = load_recipe('shapes', [*small, f'train.output={tmp_path/"run"}', *changes])
        recipe.data.files = data
        torch.manual_seed(0)
        return mdm_learner(dls or create_dls(recipe.data, recipe.train.batch_size, seed=0), recipe, cbs, **kwargs)
    return f

def fit(learn, n, *cbs):
    torch.manual_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit_steps(n, cbs=cbs)
    return learn

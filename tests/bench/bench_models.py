"""The networks of the recipes for benchmarks, with random weights and inputs: no text encoder, no data.
Needs what `mdm.models` and `mdm.diffusion` need, and PyYAML."""
import sys
from pathlib import Path
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))

from mdm.diffusion.objective import Diffusion, DiffusionConfig
from mdm.models.nested_unet import NestedUNetConfig, create_model, model_scales
from mdm.models.unet import UNetConfig

large = ['cc12m_64x64', 'cc12m_256x256', 'cc12m_1024x1024']

def read_preset(name, tiny=False):
    "Model and diffusion settings of a preset, picture size, tokens of a prompt, their width. `tiny`: for rehearsals."
    values = yaml.safe_load((root/'mdm'/'presets'/f'{name}.yaml').read_text())
    config, size = values['model'], values['data']['image_size']
    if tiny: config = shrink(config)
    model = network_config(config)
    scale = model_scales(model)[0]
    tokens, width = (4, 8) if tiny else (values['text'].get('max_tokens', 128), 2048)
    return model, DiffusionConfig(**values['diffusion'] or {}), 8*scale if tiny else size, tokens, width

def network_config(values):
    "`UNetConfig` or `NestedUNetConfig` from plain values."
    if 'inner' not in values: return UNetConfig(**values)
    return NestedUNetConfig(**{**values, 'inner': network_config(values['inner'])})

def shrink(values):
    "As many networks as `values` has, each of two levels with 8 channels, one ResNet and at most one attention."
    small = dict(channels=[8, 8], num_resnets=[1, 1], num_groups=4, time_dim=16,
                 num_attention_layers=[min(k, 1) for k in values['num_attention_layers'][-2:]])
    if values.get('text_proj_dim'): small['text_proj_dim'] = 8
    if 'inner' in values: small['inner'] = shrink(values['inner'])
    return {**values, **small}

class Bench:
    "A network with random weights, and inputs for it."
    def __init__(self, name, device='cpu', tiny=False, seed=0):
        config, diffusion, self.size, self.tokens, self.width = read_preset(name, tiny)
        self.name, self.device = name, torch.device(device)
        torch.manual_seed(seed)
        with self.device: self.model = create_model(config, self.width)
        self.diffusion = Diffusion(diffusion, self.model.scales)
        self._fill_zeros()

    def _fill_zeros(self):
        "Give the layers that begin with zeros small numbers, as a trained model has."
        for m in self.model.modules():
            if not isinstance(m, torch.nn.Conv2d | torch.nn.Linear) or m.weight.any(): continue
            torch.nn.init.normal_(m.weight, std=.02)

    def prompts(self, n): # embeddings [n,T,D] and their mask [n,T]
        put = dict(device=self.device)
        return torch.randn(n, self.tokens, self.width, **put), torch.ones(n, self.tokens, **put)

    def pictures(self, n): # clean pictures [n,3,size,size] in [-1,1]
        return torch.rand(n, 3, self.size, self.size, device=self.device)*2 - 1

    def inputs(self, n): # what one evaluation takes: x, t, cond, mask
        base = self.model.scales[0]
        x = [torch.randn(n, 3, *[self.size*s//base]*2, device=self.device) for s in self.model.scales]
        return x, torch.full((n,), 500, device=self.device), *self.prompts(n)

def count_flops(call):
    "Floating-point operations of a call (multiplication and addition are two)."
    with FlopCounterMode(display=False) as counter: call()
    return counter.get_total_flops()

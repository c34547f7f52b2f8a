"The schedule and the training objective: precision, mixed batches, refusals, a rehearsal of a GPU."
import math
from itertools import product
from typing import get_args, get_type_hints
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from mdm.diffusion.objective import Diffusion, DiffusionConfig, pyramid
from mdm.diffusion.schedule import (Prediction, add_noise, convert, from_x0, make_gammas, make_target, predictions,
                                    schedules, shift_gammas, to_x0)

def zero(x, *args): return [torch.zeros_like(o) for o in x]

def test_names_of_schedules_and_predictions_stand_once():
    hints = get_type_hints(DiffusionConfig)
    assert get_args(hints['schedule']) == schedules and hints['prediction'] == hints['loss_target'] == Prediction

@pytest.mark.parametrize('schedule', schedules)
def test_schedules_keep_their_digits_at_the_clean_end(schedule):
    gammas = make_gammas(schedule)
    assert gammas.dtype == torch.float64
    if schedule == 'deepfloyd':
        a = [math.cos((s/1000 + .008)/1.008*math.pi/2)**2 for s in (0, 1)]
        assert (1 - gammas[1]).item() == pytest.approx(1 - a[1]/a[0], rel=1e-9)
    table = Diffusion(DiffusionConfig(schedule=schedule, shifted=True, shift_power=2.), [16, 4, 1]).gammas
    assert table.dtype == torch.float64 and table.shape == (3, 1001)
    log_snr = torch.logit(table[:, 1:])
    for row, f in zip(log_snr, (16, 4)): torch.testing.assert_close(row, log_snr[-1] - 2*math.log(f), rtol=0, atol=1e-8)

@pytest.mark.parametrize('source,target', [*product(predictions, predictions)])
def test_every_prediction_becomes_every_other(source, target):
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    gamma = torch.tensor([.999, .5, .01]).double().view(3, 1, 1, 1, 1)
    x_t = add_noise(x0, eps, gamma)
    truth = [make_target(x0, eps, gamma, kind).expand_as(x_t) for kind in (source, target)]
    torch.testing.assert_close(convert(truth[0], x_t, gamma, source, target), truth[1], rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('shifted', [False, True])
def test_v_becomes_eps_without_a_loss_of_digits(shifted):
    "Through x0 the error at the first step would be 2e-5."
    d = Diffusion(DiffusionConfig(shifted=shifted), [1])
    rng = torch.Generator().manual_seed(0)
    images, noise = torch.rand(8, 3, 16, 16, generator=rng)*2 - 1, torch.randn(8, 3, 16, 16, generator=rng)
    noised = d.noised(images, tau=torch.zeros(8, dtype=torch.long), noise=[noise])
    gamma = d.gammas[0, 1]
    v = (gamma.sqrt()*noise.double() - (1 - gamma).sqrt()*images.double()).float()
    found = d.compare([v], noised)
    assert (found.preds[0] - noise).abs().max() < 1e-6 and found.loss < 1e-12
    assert (found.x0[0] - images).abs().max() < 1e-6

@pytest.mark.parametrize('kind', ['V', 'epsilon', ''])
def test_an_unknown_prediction_is_refused(kind):
    x = torch.zeros(1, 3, 4, 4)
    for call in (to_x0, from_x0):
        with pytest.raises(ValueError, match=f"unknown prediction '{kind}': choose one of v, eps, x0"):
            call(x, x, torch.tensor(.5), kind)
    with pytest.raises(ValueError, match='unknown prediction'): make_target(x, x, torch.tensor(.5), kind)

@pytest.mark.parametrize('ratio,n', [*product([[2., 1.], [1., 1.], [1., 2., 3.]], [1, 2, 3, 4, 5, 7, 32])])
def test_every_scale_of_a_mixed_batch_has_its_weight(ratio, n):
    scales = [4, 2, 1][-len(ratio):]
    weights = [3., 2., 1.][-len(ratio):]
    config = DiffusionConfig(prediction='eps', double_loss=True, mixed_ratio=ratio, multi_res_weights=weights)
    found = Diffusion(config, scales).loss(zero, torch.zeros(n, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    means = [o.mean() for o in found.per_scale]
    torch.testing.assert_close(found.loss, sum(w*m for w, m in zip(config.multi_res_weights, means)))
    assert len(found.per_scale[-1]) == n and len(found.per_sample) == n
    shares = [sum(ratio[:k + 1])/sum(ratio) for k in range(len(ratio))]
    assert [len(o) for o in found.per_scale] == [max(1, int(m*n + 1e-9)) for m in shares]

def test_a_batch_of_one_trains_every_scale_and_logs_no_nan():
    d = Diffusion(DiffusionConfig(prediction='eps', double_loss=True, mixed_ratio=[1., 1.]), [4, 1])
    found = d.loss(zero, torch.zeros(1, 3, 8, 8))
    assert all(o.mean().isfinite() for o in found.per_scale) and found.loss.isfinite()
    torch.testing.assert_close(found.loss, found.per_scale[0].mean() + found.per_scale[1].mean())

@pytest.mark.parametrize('size,scales', [((17, 17), [2, 1]), ((16, 18), [4, 1]), ((20, 16), [8, 4, 1])])
def test_a_size_that_the_scales_do_not_divide_is_refused(size, scales):
    images, words = torch.zeros(1, 3, *size), f'{size[1]} x {size[0]} pixels cannot be averaged down by {scales[0]}'
    with pytest.raises(ValueError, match=words): pyramid(images, scales)
    with pytest.raises(ValueError, match=words): Diffusion(DiffusionConfig(), scales).noised(images)

@pytest.mark.parametrize('name', ['multi_res_weights', 'mixed_ratio'])
def test_weights_of_another_number_than_the_scales_are_refused(name):
    with pytest.raises(ValueError, match=f'{name} is .*: give one number for each of the 2 scales'):
        Diffusion(DiffusionConfig(**{name: [1.]}), [2, 1])

def test_vdm_weights_weigh_the_steps():
    d = Diffusion(DiffusionConfig(prediction='eps', vdm_weights=True), [1])
    tau = torch.tensor([1, 500, 998])
    found, w = d.loss(zero, torch.zeros(3, 3, 8, 8), tau=tau), d.vdm[tau + 1]
    torch.testing.assert_close(found.loss, (w*found.per_sample).sum()/w.sum())

class Copies(TorchDispatchMode):
    "Counts tensors that go from the CPU to a GPU."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].device.type == 'cpu' and out.device.type == 'cuda'
        self.count += copied
        return out

@pytest.mark.parametrize('vdm', [False, True])
def test_a_gpu_would_run_the_loss_without_waiting(vdm):
    "A fake tensor has no numbers, so anything that would wait for one raises; tables are copied to the device once."
    with FakeTensorMode():
        config = DiffusionConfig(shifted=True, double_loss=True, mixed_ratio=[2., 1.], vdm_weights=vdm, output_scale=3.)
        d = Diffusion(config, [4, 1])
        images, counts = torch.zeros(3, 3, 8, 8, device='cuda'), []
        for _ in range(3):
            with Copies() as copies: found = d.loss(zero, images)
            counts.append(copies.count)
        assert counts[0] > 0 and counts[1:] == [0, 0]
        parts = found.loss, found.per_sample, *found.per_scale, *found.preds, *found.targets, *found.x0
        assert {(o.device.type, o.dtype) for o in parts} == {('cuda', torch.float32)}

def test_shift_gammas_keeps_the_dtype():
    for dtype in (torch.float32, torch.float64):
        assert shift_gammas(torch.tensor([.5], dtype=dtype), 4, 2).dtype == dtype

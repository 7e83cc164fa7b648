"""A plan for a memory says how many samples to forward at once, and the run keeps to it."""

import torch
import torch.nn.functional as F
from toys import toy_net, toy_plan

from trady_triton.app.train import make_optimizer, start_epoch, train_epoch


def test_an_epoch_in_micro_batches_trains_like_one_in_whole_batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 12, 12, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (7,), generator=generator)
    sizes, results, nets = [], [], []
    for micro_batch in (None, 3):
        net = toy_net()
        optimizer = make_optimizer(net, "trady", lr=0.1, plan=toy_plan(net))
        start_epoch(optimizer, 0)
        net.stem.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        results.append(train_epoch(net, optimizer, [(x, y)], F.cross_entropy, micro_batch=micro_batch))
        nets.append(net.state_dict())
    assert sizes == [7, 3, 3, 1]
    assert results[0].accuracy == results[1].accuracy
    for name, tensor in nets[0].items():
        torch.testing.assert_close(nets[1][name], tensor, rtol=1e-10, atol=1e-12)

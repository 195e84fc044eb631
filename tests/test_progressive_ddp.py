"""A progressive network that learns in two processes learns what one process learns of the whole batch."""

import torch
from torch import distributed, multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from columns import mlp, parts
from limpet import ProgressiveNetwork
from tolerances import assert_close


def learned(rank=None):
    """The columns after two tasks; a process takes its half of each batch, of as many samples."""
    torch.manual_seed(0)
    net = ProgressiveNetwork(lambda: mlp().double())
    data = [(torch.randn(3, 8, 5, dtype=torch.float64), torch.randint(3, (3, 8))) for _ in "ab"]
    own = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    for task, (xs, ys) in zip("ab", data, strict=True):
        net.add_column(task)
        model = net if rank is None else DistributedDataParallel(net)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
        for x, y in zip(xs, ys, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x[own], task), y[own]).backward()
            optimizer.step()
        net.freeze()
    return [parts(column) for column in net.columns]


def in_each_process(rank, rendezvous, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save(learned(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    multiprocessing.spawn(in_each_process, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    want = learned()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for column, of_ranks in zip(want, zip(*ranks, strict=True), strict=True):
        for name, tensor in column.items():
            assert torch.equal(of_ranks[0][name], of_ranks[1][name]), name
            assert_close(of_ranks[0][name], tensor)

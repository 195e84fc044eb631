"""Parameters sharded over processes: fused optimizers refuse them by name, before any step."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from limpet import optim


@pytest.fixture
def sharded(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield fully_shard(nn.Linear(3, 2), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_sharded_parameters_are_refused_by_name(sharded):
    for fused in (optim.SGD, optim.AdamW):
        with pytest.raises(TypeError, match="parameter 'weight' must not be sharded over processes"):
            fused(sharded.named_parameters(), lr=0.1)
        with pytest.raises(TypeError, match=r"params\[0\] of its group must not be sharded"):
            fused(sharded.parameters(), lr=0.1)
        whole = fused([nn.Parameter(torch.ones(2))], lr=0.1)
        with pytest.raises(TypeError, match="must not be sharded"):
            whole.add_param_group({"params": list(sharded.parameters())})
        assert len(whole.param_groups) == 1

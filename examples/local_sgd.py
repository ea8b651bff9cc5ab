"""Local SGD: ranks train weights of their own, which are averaged every twenty steps.

torchrun --nproc-per-node 2 examples/local_sgd.py
"""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

import aadl

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
optimizer = PostLocalSGDOptimizer(
    optim=torch.optim.SGD(model.parameters(), lr=0.05), averager=PeriodicModelAverager(period=20)
)
aadl.accelerate(optimizer, store_each_nth=1, frequency=4)  # candidates are taken where most ranks have one

torch.manual_seed(dist.get_rank())
inputs = torch.randn(64, 8)
for _ in range(100):
    optimizer.optim.zero_grad()
    torch.nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True)).backward()
    optimizer.step()
print(aadl.accelerator_of(optimizer).statistics["resets"])
dist.destroy_process_group()

"""DistributedDataParallel: every rank accelerates as a single process would; the history is shared out.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import aadl

gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if gpus else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 1).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
aadl.accelerate(optimizer, store_each_nth=2, frequency=4, shard_history=True)

torch.manual_seed(dist.get_rank())  # every rank has samples of its own
inputs = torch.randn(64, 8, device=device)
targets = inputs.sum(1, keepdim=True)
for _ in range(100):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(aadl.accelerator_of(optimizer))
del model, optimizer  # DistributedDataParallel has threads that must end before the process group does
dist.destroy_process_group()

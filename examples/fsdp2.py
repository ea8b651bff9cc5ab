"""FSDP2: sharded parameters have sharded histories, and a checkpoint loads at another world size.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import aadl

gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if gpus else "gloo")
if gpus:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh("cuda" if gpus else "cpu", (dist.get_world_size(),))


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(mesh.device_type)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    aadl.accelerate(optimizer, store_each_nth=2, frequency=4)
    return model, optimizer


def train(model, optimizer, steps):
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(dist.get_rank())).to(mesh.device_type)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True)).backward()
        optimizer.step()


model, optimizer = build()
train(model, optimizer, 50)
weights, state = get_state_dict(model, optimizer)
accelerator = aadl.accelerator_of(optimizer)
dcp.save({"model": weights, "optimizer": state, "aadl": accelerator}, checkpoint_id="checkpoint")

model, optimizer = build()  # later, on as many ranks as there are then
weights, state = get_state_dict(model, optimizer)
loaded = {"model": weights, "optimizer": state}
dcp.load(loaded, checkpoint_id="checkpoint")
set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
dcp.load({"aadl": aadl.accelerator_of(optimizer)}, checkpoint_id="checkpoint")
assert aadl.accelerator_of(optimizer).statistics["steps"] == 50
train(model, optimizer, 50)
dist.destroy_process_group()

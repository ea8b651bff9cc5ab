"""Lightning: one line in configure_optimizers; checkpoints carry the history.

pip install lightning && python examples/lightning_module.py
"""

import lightning as L
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import aadl


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        statistics = aadl.accelerator_of(self.optimizers()).statistics  # for your logger
        self.log_dict({f"aadl/{key}": float(statistics[key]) for key in ("attempts", "accepted")})
        inputs, targets = batch
        return mse_loss(self.network(inputs), targets)

    def configure_optimizers(self):
        return aadl.accelerate(torch.optim.SGD(self.parameters(), lr=0.02))  # the one line


torch.manual_seed(0)
inputs = torch.randn(40, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)
trainer = L.Trainer(max_epochs=10, accelerator="cpu", logger=False)
trainer.fit(Regression(), loader)
trainer.save_checkpoint("last.ckpt")

longer = L.Trainer(max_epochs=20, accelerator="cpu", logger=False)
longer.fit(Regression(), loader, ckpt_path="last.ckpt")  # goes on where the first one stopped
accelerator = aadl.accelerator_of(longer.optimizers[0])
print(accelerator)
assert accelerator.statistics["steps"] == longer.global_step
assert longer.logged_metrics["aadl/attempts"] > 0

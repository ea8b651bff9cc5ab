"""DeepXDE: one line after model.compile, or the residuals of each equation and condition (less loss).

pip install deepxde && python examples/deepxde_pinn.py
"""

import os

os.environ["DDE_BACKEND"] = "pytorch"  # before the import
import deepxde as dde
import torch

import aadl


def poisson(x, u):  # u'' + pi^2 sin(pi x) = 0
    return dde.grad.hessian(u, x) + torch.pi**2 * torch.sin(torch.pi * x)


interval = dde.geometry.Interval(-1, 1)
ends = dde.icbc.DirichletBC(interval, lambda x: 0, lambda x, on_boundary: on_boundary)
equation = dde.data.PDE(interval, poisson, ends, 16, 2)
model = dde.Model(equation, dde.nn.FNN([1, 20, 1], "tanh", "Glorot normal"))

# One line, for any loss. Each compile makes a new optimizer, which is accelerated again.
model.compile("adam", lr=1e-3)
aadl.accelerate(model.opt)
model.train(iterations=100)

model.restore(model.save("model"))  # the file carries the history
model.train(iterations=100)
assert aadl.accelerator_of(model.opt).statistics["steps"] == 200

# For losses that are means of squares, as DeepXDE's are: a loss function that hands its residuals over.
accelerator = None
weights = [1, 10]  # of the equation and of the ends


def observed_squares(weight):
    def loss(target, prediction):
        residuals = (prediction - target) / target.numel() ** 0.5
        if accelerator is not None:
            accelerator.observe(weight**0.5 * residuals)
        return residuals.square().sum()

    return loss


class Resampler(dde.callbacks.PDEPointResampler):
    def on_epoch_end(self):
        super().on_epoch_end()
        if self.epochs_since_last_resample == 0:  # the points are new: their residuals have no history yet
            aadl.reset_history(self.model.opt)


model.compile("adam", lr=1e-3, loss=[observed_squares(weight) for weight in weights], loss_weights=weights)
accelerator = aadl.accelerator_of(aadl.accelerate(model.opt, "nonlinear_gmres"))
model.train(iterations=200, callbacks=[Resampler(period=100)])
print(accelerator)
assert accelerator.statistics["accepted"] > 0 and accelerator.statistics["resets"] == {"user": 2}

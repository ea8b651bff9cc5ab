"""The heat equation, as a user writes it in a file."""

import textwrap

HEAT = """
    import math

    import torch

    from experiments.pinn.equation import Equation


    class Heat(Equation):
        num_space = 1

        def __init__(self, diffusivity=0.1, mode=1):
            self.diffusivity, self.mode = diffusivity, mode
            self.label = f"heat equation, mode {mode}"

        def sample(self, uniform):
            return uniform

        def conditions(self, uniform):
            points = torch.cat([uniform[:, :1], torch.zeros_like(uniform[:, :1])], dim=1)
            return points, self.exact(points)

        def residual(self, points, u, source):
            return u.time - self.diffusivity * u.laplacian

        def exact(self, points):
            k = self.mode * math.pi
            return torch.exp(-self.diffusivity * k * k * points[:, 1:]) * torch.sin(k * points[:, :1])

        def test_points(self):
            x = torch.linspace(0, 1, 11, dtype=torch.float64)
            return {"grid": torch.cartesian_prod(x, x)}
"""


def write_heat(folder, text=HEAT, name="heat.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path

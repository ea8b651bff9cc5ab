"""Textbook twin of the accelerator: lists of pairs, an orthogonal factorization in float64, no shortcut anywhere.

Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011), eq. (2.2), with the
schedule of aadl: a macro-step is store_each_nth steps; the pair is stored at its end; every ceil(frequency /
store_each_nth) macro-steps the stored pairs are mixed, once more than wait_iterations steps are done.
"""

import numpy as np


class TextbookAnderson:
    """Accelerate `step`, a function from float64 vectors to float64 vectors, started at `x`."""

    def __init__(self, step, x, *, history_depth, store_each_nth=1, frequency=1, wait_iterations=0, relaxation=1.0):
        self.step, self.x, self.start = step, np.array(x, dtype=np.float64), np.array(x, dtype=np.float64)
        self.history_depth, self.store_each_nth = history_depth, store_each_nth
        self.period = int(np.ceil(frequency / store_each_nth))
        self.wait_iterations, self.relaxation = wait_iterations, relaxation
        self.pairs, self.steps, self.accelerations = [], 0, []

    def advance(self):
        """One optimizer step, and what is due after it."""
        self.x = self.step(self.x)
        self.steps += 1
        if self.steps % self.store_each_nth != 0:
            return
        self.pairs = [*self.pairs, (self.start, self.x)][-(self.history_depth + 1) :]
        due = self.steps // self.store_each_nth % self.period == 0
        if due and self.steps > self.wait_iterations and len(self.pairs) > 1:
            self.x = mixed(self.pairs, self.relaxation)
            self.accelerations.append(self.steps)
        self.start = self.x


def mixed(pairs, relaxation=1.0):
    """The Anderson iterate of pairs (x_j, g_j), oldest first."""
    x, g = (np.stack(vectors, axis=1) for vectors in zip(*pairs, strict=True))
    f = g - x
    gamma = np.linalg.lstsq(np.diff(f), f[:, -1], rcond=None)[0]
    remainder = f[:, -1] - np.diff(f) @ gamma
    return g[:, -1] - np.diff(g) @ gamma - (1 - relaxation) * remainder

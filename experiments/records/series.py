"""Units and long names of the series in a record."""

from __future__ import annotations

SCHEMA_VERSION = 1

# Units and long names; a cause of rejection gets its own series, so those come by prefix.
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "metrics/train/loss": ("1", "mean squared error on the training set"),
    "metrics/train/minibatch_loss": ("1", "mean over the epoch of the loss that the optimizer saw"),
    "metrics/validation/loss": ("1", "loss on the validation set: mean squared error, or cross entropy of classes"),
    "timing/training_seconds": ("s", "time spent in training since the start, without evaluation"),
    "timing/training_cpu_seconds": ("s", "CPU time of the process in training since the start, without evaluation"),
    "timing/input_seconds": ("s", "part of the training in which rank 0 waited for images, since the start"),
    "timing/acceleration_seconds": ("s", "part of the training that the acceleration took, since the start"),
    "timing/evaluation_seconds": ("s", "time spent in evaluations since the start, statistics of BatchNorm included"),
    "timing/batchnorm_seconds": ("s", "part of the evaluations that computed statistics of BatchNorm, since the start"),
    "timing/images_per_second": ("s-1", "images per second of training, over all ranks, in the epoch"),
    "metrics/train/pde_loss": ("1", "mean squared residual of the equation on the present interior points"),
    "metrics/train/condition_loss": ("1", "mean squared error on the present points of the conditions, unweighted"),
    "metrics/skipped_steps": ("1", "steps that the GradScaler skipped for an overflow, since the start"),
    "metrics/evaluations": ("1", "evaluations of the loss since the start, trials included"),
    "metrics/learning_rate": ("1", "learning rate of the present optimizer"),
    "updates/relative_standard_deviation": ("1", "relative standard deviation of consecutive updates in the interval"),
    "acceleration/steps": ("1", "optimizer steps since the start"),
    "acceleration/macro_steps": ("1", "macro-steps since the start"),
    "acceleration/attempts": ("1", "accelerations tried since the start"),
    "acceleration/accepted": ("1", "accelerations accepted since the start"),
    "acceleration/reverted": ("1", "accepted accelerations that were taken back since the start"),
    "acceleration/skipped_steps": ("1", "steps that a fused GradScaler skipped or that wrote nothing, since the start"),
    "acceleration/suspensions": ("1", "suspensions by the trust ratio since the start"),
    "acceleration/suspended": ("1", "accelerations left out during suspensions since the start"),
    "acceleration/closure_evaluations": ("1", "evaluations of the loss by the safeguard since the start"),
    "acceleration/residual_evaluations": ("1", "evaluations of residuals by the acceleration since the start"),
    "acceleration/averaging": ("1", "whether the moving average is on"),
    "acceleration/relative_standard_deviation": ("1", "relative standard deviation between updates in the window"),
    "acceleration/trust_ratio": ("1", "next residual norm over the predicted one; of residuals: gained over promised"),
    "acceleration/damping": ("1", "damping of the mixing problem, relative to unit columns"),
    "acceleration/gain": ("1", "norm of the mixed residual over the plain one"),
    "acceleration/condition_number": ("1", "condition number of the column-equilibrated residual differences DF"),
    "acceleration/numerical_rank": ("1", "numerical rank of the Gram matrix"),
    "acceleration/coefficient_norm": ("1", "norm of the mixing coefficients gamma for unit columns"),
}

ATTEMPTS = "attempts"
"""Group of the attempts of an acceleration, one after the other."""
OF_ATTEMPTS: dict[str, tuple[str, str]] = {
    "step": ("1", "optimizer steps since the start"),
    "stage": ("1", "stage whose acceleration it was, from 0"),
    "outcome": ("1", "accepted, the cause of the rejection, or reverted (an accepted point was taken back)"),
}

# The same for series of test sets, whose names end in that of the set.
ERRORS: dict[str, tuple[str, str]] = {
    "metrics/validation/relative_l2_": ("1", "L2 norm of the error over that of the exact solution on the test set"),
    "metrics/validation/mean_absolute_error_": ("1", "mean absolute error on the test set"),
    "metrics/validation/max_error_": ("1", "largest absolute error on the test set"),
}
# Those of image classification; "stale" are those with the statistics of BatchNorm that the training left.
CLASSIFICATION: dict[str, tuple[str, str]] = {
    "loss": ("1", "cross entropy on the validation set, without label smoothing"),
    "top1": ("1", "share of the validation images whose class came first"),
    "top5": ("1", "share of the validation images whose class came among the first five"),
    "num_correct_top1": ("1", "number of validation images whose class came first"),
    "num_correct_top5": ("1", "number of validation images whose class came among the first five"),
    "num_images": ("1", "number of validation images that were evaluated"),
}
# Those that mean something else where points are sampled.
SAMPLED: dict[str, tuple[str, str]] = {
    "metrics/train/loss": ("1", "training loss on the present points"),
    "metrics/validation/loss": ("1", "training loss on points that training never sees"),
}

SCALES: dict[str, tuple[str, str]] = {
    "epoch": ("epoch", "completed passes over the training set"),
    "iteration": ("1", "evaluations of the gradient, or of a Jacobian, without the trials of an acceleration"),
}


def description_of_attempt(name: str) -> tuple[str, str]:
    return OF_ATTEMPTS.get(name) or description_of(f"acceleration/{name}", False)


def description_of(name: str, is_sampled: bool) -> tuple[str, str]:
    if is_sampled and name in SAMPLED:
        return SAMPLED[name]
    group, _, short = name.rpartition("/")
    stale, short = short.startswith("stale_"), short.removeprefix("stale_")
    if group == "metrics/validation" and short in CLASSIFICATION and (stale or name not in DESCRIPTIONS):
        units, long_name = CLASSIFICATION[short]
        return units, long_name + (", with stale statistics of BatchNorm" if stale else "")
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    for prefix, (units, long_name) in ERRORS.items():
        if name.startswith(prefix):
            return units, f"{long_name} {name.removeprefix(prefix)}"
    short = name.rpartition("/")[2]
    cause = short.removeprefix("rejected_").replace("_", " ")
    return "1", f"accelerations rejected since the start: {cause}" if "/rejected_" in name else short.replace("_", " ")

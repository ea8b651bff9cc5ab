"""The colors of all figures: one color a method, whatever the figure shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.records.compare import Variant

COLORS = {
    "plain": "#333333",
    "ema": "#009E73",
    "mean": "#E377C2",
    "published": "#0072B2",
    "published average": "#7B3FA0",
    "aadl": "#D55E00",
    "aadl settings": "#E69F00",
    "aadl residuals": "#C2185B",
    "LBFGS": "#8C564B",
    "MuonAdam": "#17A2B8",
    "SOAP": "#4B5FBF",
    "SSBroyden": "#B5A300",
    "schedule-free": "#7CB342",
    "LevenbergMarquardt": "#556B2F",
}
"""Method -> color. Plain SGD and plain Adam are one method; "aadl settings" is aadl with other than its defaults."""
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
"""Of the first and the further variants with one method in one figure."""


def method_of(variant: Variant) -> str:
    """The method of a variant, a key of COLORS; a run of two stages has the method of the stage that sets it apart."""
    stages = [stage for stage in (variant.definition.get("then"), variant.definition) if stage]
    if variant.role.startswith("aadl"):
        accelerated = next(stage["acceleration"] for stage in stages if stage.get("acceleration") is not None)
        return "aadl residuals" if accelerated.get("acceleration_type") == "nonlinear_gmres" else variant.role
    if variant.role.startswith("published"):
        return "published average" if "average" in variant.role else "published"
    name = stages[0]["optimizer"]["name"]
    if "ScheduleFree" in name:
        return "schedule-free"
    return name if variant.role == "plain" and name in COLORS else variant.role


def styled(variants: Sequence[Variant]) -> list[tuple[Variant, str, Any]]:
    """Variants with color and line style; further variants with one method get other line styles."""
    seen: dict[str, int] = {}
    entries = []
    for variant in variants:
        method = method_of(variant)
        repeat = seen.get(method, 0)
        seen[method] = repeat + 1
        entries.append((variant, COLORS[method], LINE_STYLES[repeat % len(LINE_STYLES)]))
    return entries

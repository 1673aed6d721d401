"""What a hardware command is about: an artifact with measured spikes, or a built-in workload of an assumed density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .options import extra

if TYPE_CHECKING:
    from mdsnn.hwsim.mapping import Workload

F = TypeVar("F", bound=Callable[..., Any])

SHAPE = ("input_shape", "timesteps", "weight_bits", "membrane_bits", "classes", "density")
"""Parameters that only a workload takes."""


def workload_options(function: F) -> F:
    """`--workload NAME` and what describes it."""
    for option in (
        click.option(
            "--density", default=0.1, show_default=True, type=float, help="Share of neurons that spike a step."
        ),
        click.option("--classes", default=100, show_default=True, type=int, help="Classes of the workload."),
        click.option("--membrane-bits", default=4, show_default=True, type=int, help="Membrane bits, 2 to 8."),
        click.option("--weight-bits", default=4, show_default=True, type=int, help="Weight bits, 2 to 8."),
        click.option("--T", "timesteps", metavar="INTEGER", type=int, help="Timesteps of the workload."),
        click.option("--input", "input_shape", metavar="CxHxW", help="Input of the workload, such as 2x48x48."),
        click.option(
            "--workload", metavar="NAME", help="Instead of an artifact: ms-resnet18 or ms-resnet34, described by shape."
        ),
    ):
        function = option(function)
    return function


@dataclass(frozen=True)
class Described:
    """A built-in workload and the density of its spikes."""

    workload: Workload
    density: float


def described(ctx: click.Context, *, only_with_artifact: tuple[str, ...]) -> Described | None:
    """The workload that the options describe, or None if an artifact was named.

    only_with_artifact  parameters that mean nothing for a workload
    raises  click.UsageError  for both, neither, or options of the other kind
            ConfigError       for a workload that does not exist or a density outside 0..1
    """
    given = ctx.params

    def told(name: str) -> bool:
        return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)

    def option(name: str) -> str:
        return next(str(p.opts[0]) for p in ctx.command.params if p.name == name)

    if (given["artifact"] is None) == (given["workload"] is None):
        raise click.UsageError("name either an ARTIFACT or a --workload, such as --workload ms-resnet18", ctx)
    misplaced = [name for name in (SHAPE if given["workload"] is None else only_with_artifact) if told(name)]
    if misplaced:
        kind = "a --workload" if given["workload"] is None else "an ARTIFACT"
        raise click.UsageError(f"{option(misplaced[0])} is for {kind}", ctx)
    if given["workload"] is None:
        return None
    missing = [option(name) for name in ("input_shape", "timesteps") if given[name] is None]
    if missing:
        raise click.UsageError(f"--workload needs {' and '.join(missing)}, as in --input 2x48x48 --T 10", ctx)
    workload = extra("report", "mdsnn.hwsim.mapping").named_workload(
        given["workload"],
        given["input_shape"],
        given["timesteps"],
        given["weight_bits"],
        given["membrane_bits"],
        classes=given["classes"],
    )
    extra("report", "mdsnn.hwsim.activity").uniform(workload, given["density"])  # refuse a bad density now
    return Described(workload, given["density"])

"""`mdsnn analog`: accuracy of an artifact on crossbars whose devices and converters are not ideal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from mdsnn.kernels.errors import ConfigError, InputError

from .options import (
    JsonCommand,
    check_environment,
    check_outputs,
    extra,
    force_option,
    json_option,
    read_data,
    write_json,
)
from .terminal import progress, table, tell


@click.command(cls=JsonCommand)
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--chip", default="fefet32", show_default=True, help="A chip of model physical, or your own .toml file.")
@click.option("--data", default="builtin:digits", show_default=True, help="A data set with labels.")
@click.option("--data-path", help="Where the data set lies, for those that need it.")
@click.option("--limit", type=click.IntRange(1), help="At most so many samples; default: all.")
@click.option(
    "--trials", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Programmings of the chip."
)
@click.option("--sigma", help="sigma/mu of the cells, comma-separated; default: 0 and the chip's.")
@click.option("--adc-bits", help="Such as 4..10 or 4,6,8; default: from the chip's to a lossless ADC, in steps of 2.")
@click.option(
    "--transfer",
    default="clip",
    show_default=True,
    type=click.Choice(["clip", "scale"]),
    help="What an ADC of too few bits does: keep its step and clip, or widen its step and round.",
)
@click.option(
    "--stuck", metavar="LOW[,HIGH]", default="0", help="Share of cells stuck at the lowest and the top level."
)
@click.option("--ir-drop", is_flag=True, help="Wires have the chip's resistance.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the programmings.")
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes; default: all cores. The result is the same.")
@json_option
@force_option
def command(
    artifact: str,
    chip: str,
    data: str,
    data_path: str | None,
    limit: int | None,
    trials: int,
    sigma: str | None,
    adc_bits: str | None,
    transfer: str,
    stuck: str,
    ir_drop: bool,
    seed: int,
    jobs: int | None,
    json_file: str | None,
    force: bool,
) -> None:
    """Program ARTIFACT into crossbars again and again, and say how accurate it is there.

    Every trial draws all cells anew; what is printed is the mean accuracy over trials and its 95 % confidence interval,
    against sigma and ADC bits. With ideal devices (sigma 0) and enough ADC bits it equals the integer engine.

    \b
    Examples:
      mdsnn analog builtin:digits
      mdsnn analog student.mdsnn --chip fefet32 --data digits --trials 20 --sigma 0,0.1,0.2 --adc-bits 4..10
    """
    check_outputs([json_file], force=force, inputs=[artifact, chip])
    document = measure(
        artifact,
        chip=chip,
        data=data,
        data_path=data_path,
        limit=limit,
        trials=trials,
        sigmas=None if sigma is None else numbers(sigma, "--sigma"),
        adc_bits=adc_bits,
        transfer=transfer,
        stuck=numbers(stuck, "--stuck"),
        ir_drop=ir_drop,
        seed=seed,
        jobs=jobs,
    )
    if not write_json(document, json_file, force=force):
        show(document)


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers of a comma-separated text.

    raises  ConfigError  naming `option`
    """
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise ConfigError(f"{option} {text!r:.60} is no list of numbers such as 0,0.1,0.2")
    return values


def measure(
    path: str,
    *,
    chip: str = "fefet32",
    data: str = "builtin:digits",
    data_path: str | None = None,
    limit: int | None = None,
    trials: int = 20,
    sigmas: Sequence[float] | None = None,
    adc_bits: str | None = None,
    transfer: str = "clip",
    stuck: Sequence[float] = (0.0,),
    ir_drop: bool = False,
    seed: int = 0,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Accuracy over programmings, for every sigma and ADC (schema mdsnn.analog/1)."""
    import numpy as np

    from mdsnn.export import artifact
    from mdsnn.kernels import Engine

    check_environment()
    crossbar = extra("report", "mdsnn.hwsim.crossbar")
    network = artifact.load(path)
    the_chip = extra("report", "mdsnn.hwsim.config").load_chip(chip)
    the_chip.require("physical")
    if len(stuck) > 2:
        raise ConfigError(f"--stuck takes a share at the lowest level and one at the top, not {len(stuck)}")
    low, high = (*stuck, 0.0)[:2]
    tried = (0.0, the_chip["cell.sigma"]) if sigmas is None else sigmas
    devices = [crossbar.Devices(value, low, high, ir_drop) for value in dict.fromkeys(tried)]
    if adc_bits is None:
        rows, top = the_chip.integer("crossbar.rows"), (1 << the_chip.integer("cell.bits")) - 1
        own, enough = the_chip.integer("adc.bits"), extra("report", "mdsnn.hwsim.converters").lossless_bits(rows * top)
        bits = (*range(own, enough, 2), max(own, enough))
    else:
        bits = extra("report", "mdsnn.hwsim.sweep").parse_axis("adc-bits", adc_bits)
    pixels, labels = read_data(network, data, data_path, limit)
    if labels is None:
        raise InputError(f"{data}: holds no labels, so that nothing can be called accurate; name a data set")
    processes = extra("report", "mdsnn.hwsim.processes").cores() if jobs is None else jobs
    with progress("programming") as tick:
        results = crossbar.analog_grid(
            network,
            pixels,
            labels,
            the_chip,
            trials=trials,
            rng=np.random.default_rng(seed),
            devices=devices,
            adc_bits=bits,
            transfer=transfer,
            jobs=processes,
            progress=tick,
        )
    return {
        "schema": "mdsnn.analog/1",
        "artifact": path,
        "chip": the_chip.name,
        "data": data,
        "samples": len(labels),
        "trials": trials,
        "seed": seed,
        "engine_accuracy": float(np.mean(Engine(network).run(pixels).predictions == labels)),
        "points": [
            {
                "sigma": result.devices.sigma,
                "stuck_low": low,
                "stuck_high": high,
                "ir_drop": ir_drop,
                "adc_bits": result.bits,
                "transfer": transfer,
                "accuracy": result.mean,
                "low": result.interval[0],
                "high": result.interval[1],
                "accuracies": list(result.accuracies),
            }
            for result in results
        ],
    }


def show(document: dict[str, Any]) -> None:
    """Print accuracy against sigma (down) and ADC bits (across)."""
    points = {(p["sigma"], p["adc_bits"]): p for p in document["points"]}
    bits = list(dict.fromkeys(p["adc_bits"] for p in document["points"]))
    rows = []
    for sigma in dict.fromkeys(p["sigma"] for p in document["points"]):
        cells = [points[sigma, each] for each in bits]
        texts = [f"{100 * p['accuracy']:.1f} [{100 * p['low']:.1f}, {100 * p['high']:.1f}]" for p in cells]
        rows.append([f"{sigma:g}", len(cells[0]["accuracies"]), *texts])
    table(["sigma", "trials", *(f"{each}-bit ADC" for each in bits)], rows)
    first = document["points"][0]
    others = []
    if first["stuck_low"] or first["stuck_high"]:
        others.append(f"stuck cells {first['stuck_low']:g} low, {first['stuck_high']:g} high")
    if first["ir_drop"]:
        others.append("IR drop")
    tell(
        f"accuracy in % and its 95 % confidence interval over programmings of {document['chip']}"
        f"{''.join(f', {text}' for text in others)}; {document['samples']} samples of {document['data']}; "
        f"the integer engine: {100 * document['engine_accuracy']:.1f} %"
    )

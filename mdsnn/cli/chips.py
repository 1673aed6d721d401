"""`mdsnn chips`: the chips there are, and what they are made of."""

from __future__ import annotations

from typing import Any

import click

from .options import JsonCommand, check_outputs, extra, force_option, json_option, write_json
from .terminal import table, tell


@click.command(cls=JsonCommand)
@click.argument("action", type=click.Choice(["list", "show"]), default="list")
@click.argument("chip", required=False)
@json_option
@force_option
def command(action: str, chip: str | None, json_file: str | None, force: bool) -> None:
    """List the shipped chips, or show every constant of CHIP (a name or a .toml file) with its source.

    \b
    Examples:
      mdsnn chips
      mdsnn chips show fefet32
    """
    check_outputs([json_file], force=force)
    if action == "list" and chip is not None:
        raise click.UsageError(f"to list takes no chip; did you mean: mdsnn chips show {chip}")
    if action == "show" and chip is None:
        raise click.UsageError("name a chip: mdsnn chips show fefet32")
    document = constants(str(chip)) if action == "show" else listing()
    if write_json(document, json_file, force=force):
        return
    if action == "list":
        table(["chip", "model", "what"], [[c["name"], c["model"], c["description"]] for c in document["chips"]])
        return
    tell(f"{document['name']}, model {document['model']}: {document['description']}")
    rows = [[c["key"], c["value"], c["unit"], c["confidence"], c["source"]] for c in document["constants"]]
    table(["constant", "value", "unit", "confidence", "source"], rows)


def listing() -> dict[str, Any]:
    """The shipped chips (schema mdsnn.chips/1)."""
    config = extra("report", "mdsnn.hwsim.config")
    chips = [config.load_chip(name) for name in config.shipped_chips()]
    return {
        "schema": "mdsnn.chips/1",
        "chips": [{"name": chip.name, "model": chip.model, "description": chip.description} for chip in chips],
    }


def constants(name: str) -> dict[str, Any]:
    """Every constant of a chip, with unit, source and confidence (schema mdsnn.chip/1)."""
    chip = extra("report", "mdsnn.hwsim.config").load_chip(name)
    return {
        "schema": "mdsnn.chip/1",
        "name": chip.name,
        "model": chip.model,
        "description": chip.description,
        "constants": [
            {
                "key": key,
                "value": constant.given,
                "unit": constant.unit,
                "source": constant.source,
                "confidence": constant.confidence,
                "chip": constant.chip,
            }
            for key, constant in sorted(chip.constants.items())
        ],
    }

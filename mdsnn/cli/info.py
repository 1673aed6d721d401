"""`mdsnn info`: what is inside an artifact."""

from __future__ import annotations

from typing import Any

import click

from .options import JsonCommand, check_outputs, force_option, json_option, write_json
from .terminal import human_bytes, table, tell


@click.command(cls=JsonCommand)
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--notes", is_flag=True, help="Also show the notes: the real scales behind the integers, and more.")
@json_option
@force_option
def command(artifact: str, notes: bool, json_file: str | None, force: bool) -> None:
    """Show the graph, bits, tables, bounds and bytes of ARTIFACT (a file, or builtin:digits).

    Everything shown was recomputed from the codes while loading.

    \b
    Examples:
      mdsnn info builtin:digits
      mdsnn info student.mdsnn --notes
    """
    check_outputs([json_file], force=force, inputs=[artifact])
    document = describe(artifact)
    if write_json(document, json_file, force=force):
        return
    head = document["network"]
    tell(f"{artifact}: {head['bytes']} bytes, sha256 {head['sha256']}")
    tell(
        f"input {head['input']}, {head['timesteps']} timesteps, residual grid 2^-{head['frac_bits']} clipped at"
        f" +-{head['clip']}, {head['classes']} classes, {head['weights']} weights, {head['neurons']} neurons"
    )
    rows = [
        [n["name"], n["type"], n["shape"], n["bits"] or "", n["range"], n["dtype"], n["membrane"], n["bytes"] or ""]
        for n in document["nodes"]
    ]
    table(["node", "type", "output", "bits", "range", "dtype", "membrane h", "bytes"], rows)
    tell(
        f"weights {human_bytes(head['weight_bytes'])}, tables and constants {human_bytes(head['table_bytes'])},"
        f" the same weights in float32 {human_bytes(head['float_bytes'])}"
    )
    for key, value in document["notes"].items() if notes else ():
        tell(f"note  {key}: {value}")


def describe(path: str) -> dict[str, Any]:
    """What `mdsnn info` says of an artifact, as JSON values (schema mdsnn.info/1)."""
    from math import prod

    from mdsnn.export import artifact
    from mdsnn.kernels.network import Lif

    network = artifact.load(path)
    content = artifact.to_bytes(network)
    sizes = {size.name: size for size in artifact.layer_sizes(network)}
    proof = network.proof
    nodes = []
    for node in network.nodes:
        name = node.name
        size = sizes.get(name)
        nodes.append(
            {
                "name": name,
                "type": type(node).__name__,
                "inputs": list(node.inputs),
                "shape": "x".join(map(str, proof.shapes[name])),
                "bits": getattr(node, "bits", None),
                "kind": proof.kinds[name],
                "range": "{}..{}".format(*proof.ranges[name]),
                "dtype": proof.dtypes[name].name,
                "membrane": "{}..{}".format(*proof.membranes[name]) if isinstance(node, Lif) else "",
                "bytes": size.weight_bytes + size.table_bytes if size else 0,
                "static": bool(proof.static[name]),
            }
        )
    spec = network.input
    return {
        "schema": "mdsnn.info/1",
        "network": {
            "bytes": len(content),
            "sha256": artifact.digest(network),
            "input": f"{spec.channels}x{spec.height}x{spec.width} uint8 ({spec.coding})",
            "timesteps": network.timesteps,
            "frac_bits": network.grid.frac_bits,
            "clip": network.grid.clip,
            "classes": network.classes,
            "labels": list(network.labels),
            "weights": sum(size.parameters for size in sizes.values()),
            "neurons": sum(prod(proof.shapes[lif.name]) for lif in network.lifs),
            "weight_bytes": sum(size.weight_bytes for size in sizes.values()),
            "table_bytes": sum(size.table_bytes for size in sizes.values()),
            "float_bytes": sum(size.float_bytes for size in sizes.values()),
        },
        "nodes": nodes,
        "notes": dict(network.notes),
    }

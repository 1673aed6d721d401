"""`mdsnn export`: from a checkpoint to the artifact, to ONNX and to test vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    JsonCommand,
    check_folder,
    check_outputs,
    extra,
    force_option,
    json_option,
    not_empty,
    read_data,
    write_json,
)
from .terminal import human_bytes, progress, say, table, tell

if TYPE_CHECKING:
    from mdsnn.kernels.network import IntegerNetwork


@click.command(cls=JsonCommand)
@click.argument("checkpoint", metavar="CKPT")
@click.option("-o", "--output", required=True, metavar="FILE.mdsnn", help="The artifact to write.")
@click.option("--onnx", metavar="FILE.onnx", help="Also write an ONNX model of integer tensors.")
@click.option(
    "--onnx-form",
    type=click.Choice(["unrolled", "scan"]),
    default="unrolled",
    show_default=True,
    help="unrolled: T copies of the graph; scan: one, in a loop.",
)
@click.option(
    "--onnx-carrier",
    type=click.Choice(["int", "float"]),
    default="int",
    show_default=True,
    help="How convolutions carry their integers; float is faster in ONNX Runtime and exact below 2^24.",
)
@click.option(
    "--vectors",
    metavar="DIR",
    callback=not_empty,
    help="Also write test vectors for a hardware team (see the manifest).",
)
@click.option(
    "--vector-samples", default=2, show_default=True, type=click.IntRange(1, 64), help="Samples in the vectors."
)
@click.option("--data", default="digits", show_default=True, help="Where the vectors' samples come from.")
@click.option("--data-path", help="Where the data set lies, for those that need it.")
@click.option(
    "--bn-table",
    type=click.Choice(["auto", "affine", "dense"]),
    default="auto",
    show_default=True,
    help="auto: a layer's table is dense if it takes at most --bn-budget bytes.",
)
@click.option(
    "--bn-budget", default=65536, show_default=True, type=click.IntRange(0, 1 << 30), help="Bytes, see --bn-table."
)
@json_option
@force_option
def command(
    checkpoint: str,
    output: str,
    onnx: str | None,
    onnx_form: str,
    onnx_carrier: str,
    vectors: str | None,
    vector_samples: int,
    data: str,
    data_path: str | None,
    bn_table: str,
    bn_budget: int,
    json_file: str | None,
    force: bool,
) -> None:
    """Lower the student in CKPT to integers, prove every width, and write it.

    The same checkpoint gives the same bytes.

    \b
    Examples:
      mdsnn export student/model.ckpt -o student.mdsnn
      mdsnn export student/model.ckpt -o student.mdsnn --onnx student.onnx --vectors vectors --vector-samples 4
    """
    from mdsnn.export import artifact

    check_outputs([output, onnx, json_file], force=force, inputs=[checkpoint])
    if vectors is not None:
        check_folder(vectors, force=force)
    network = lower_checkpoint(checkpoint, bn_table=bn_table, bn_budget=bn_budget)
    pixels = None if vectors is None else read_data(network, data, data_path, limit=vector_samples)[0]
    written: dict[str, Any] = {"artifact": {"path": output, "bytes": artifact.save(network, output, force=force)}}
    if onnx is not None:
        written["onnx"] = {"path": onnx, "bytes": write_onnx(network, onnx, onnx_form, onnx_carrier, force=force)}
    if vectors is not None and pixels is not None:
        from mdsnn.export.vectors import write_vectors

        with progress("vectors") as tick:
            count = write_vectors(network, pixels, vectors, force=force, progress=tick)
        written["vectors"] = {"path": vectors, "arrays": count}
    document = summarise(network, written)
    if not write_json(document, json_file, force=force):
        show(document)


def lower_checkpoint(path: str, *, bn_table: str = "auto", bn_budget: int = 65536) -> IntegerNetwork:
    """The integer network of a student checkpoint. Raises CheckpointError (a teacher's, for one), LoweringError."""
    from mdsnn.kernels.errors import LoweringError, MdsnnError

    lowering = extra("train", "mdsnn.export.lower")
    model, labels = frozen_student(path)
    try:
        network: IntegerNetwork = lowering.lower(model, bn_table=bn_table, bn_budget=bn_budget, labels=labels)
    except MdsnnError as fault:
        raise LoweringError(f"{path}: {fault}") from fault
    return network


def frozen_student(path: str) -> tuple[Any, tuple[str, ...]]:
    """The frozen model of a student checkpoint and its labels. Raises CheckpointError, LoweringError with the path."""
    from mdsnn.kernels.errors import LoweringError, MdsnnError

    checkpoints = extra("train", "mdsnn.checkpoint")
    freezing = extra("train", "mdsnn.freeze")
    checkpoint = checkpoints.load(path)
    model = checkpoints.build_model(checkpoint)
    try:
        return freezing.freeze(model), tuple(checkpoint.document["labels"])
    except MdsnnError as fault:
        raise LoweringError(f"{path}: {fault}") from fault


def write_onnx(
    network: IntegerNetwork, path: str | Path, form: str = "unrolled", carrier: str = "int", *, force: bool = False
) -> int:
    """Write the ONNX model of `network`; returns its bytes."""
    from mdsnn.export import artifact

    onnx = extra("train", "mdsnn.export.onnx")
    content: bytes = onnx.to_onnx(network, form=form, carrier=carrier, digest=artifact.digest(network))
    onnx.save_onnx(path, content, force=force)
    return len(content)


def summarise(network: IntegerNetwork, written: dict[str, Any]) -> dict[str, Any]:
    """Sizes per layer and in total, and what was written (schema mdsnn.export/1)."""
    from mdsnn.export import artifact

    sizes = artifact.layer_sizes(network)
    return {
        "schema": "mdsnn.export/1",
        "sha256": artifact.digest(network),
        "written": written,
        "weights": sum(size.parameters for size in sizes),
        "weight_bytes": sum(size.weight_bytes for size in sizes),
        "table_bytes": sum(size.table_bytes for size in sizes),
        "float_bytes": sum(size.float_bytes for size in sizes),
        "layers": [
            {
                "name": size.name,
                "type": size.type,
                "bits": size.bits,
                "weights": size.parameters,
                "weight_bytes": size.weight_bytes,
                "table_bytes": size.table_bytes,
                "range": list(network.proof.ranges[size.name]),
                "dtype": network.proof.dtypes[size.name].name,
            }
            for size in sizes
        ],
    }


def show(document: dict[str, Any]) -> None:
    """Print the sizes and the proven widths."""
    rows = [
        [
            layer["name"],
            layer["type"],
            layer["bits"] or "",
            layer["weights"] or "",
            layer["weight_bytes"] or "",
            layer["table_bytes"] or "",
            "{}..{}".format(*layer["range"]),
            layer["dtype"],
        ]
        for layer in document["layers"]
    ]
    table(["layer", "type", "bits", "weights", "weight B", "table B", "proven range", "held in"], rows)
    tell(
        f"{document['weights']} weights: {human_bytes(document['weight_bytes'])} of codes and"
        f" {human_bytes(document['table_bytes'])} of tables, {human_bytes(document['float_bytes'])} as float32"
    )
    for what, entry in document["written"].items():
        size = f"{entry['bytes']} bytes" if "bytes" in entry else f"{entry['arrays']} arrays"
        say(f"wrote {what}: {entry['path']} ({size})")

"""`mdsnn run`: classes and scores of images."""

from __future__ import annotations

from typing import Any

import click

from .options import JsonCommand, check_outputs, force_option, json_option, write_json
from .terminal import table


@click.command(cls=JsonCommand)
@click.argument("artifact", metavar="ARTIFACT")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="How many classes to show a sample.")
@click.option("--resize", is_flag=True, help="Resize image files to the network's size instead of refusing others.")
@click.option("--engine", type=click.Choice(["native", "numba", "reference"]), help="Kernels; default: the fastest.")
@json_option
@force_option
def command(
    artifact: str,
    images: tuple[str, ...],
    top: int,
    resize: bool,
    engine: str | None,
    json_file: str | None,
    force: bool,
) -> None:
    """Classify IMAGE files (PNG, JPEG, ...) or one .npy batch with ARTIFACT.

    The scores are the integer logits: only their order means something. `builtin:digits` names the artifact that ships
    in the package, and as an IMAGE its 64 test digits.

    \b
    Examples:
      mdsnn run builtin:digits builtin:digits --top 1
      mdsnn run student.mdsnn seven.png photo.jpg --resize
      mdsnn run student.mdsnn batch.npy --json scores.json
    """
    check_outputs([json_file], force=force, inputs=[artifact, *images])
    document = classify(artifact, images, top=top, resize=resize, engine=engine)
    if write_json(document, json_file, force=force):
        return
    rows = [
        [sample["name"], "  ".join(f"{best['label']} ({best['logit']})" for best in sample["top"])]
        for sample in document["samples"]
    ]
    table(["image", "class (logit), best first"], rows)


def classify(
    path: str, images: tuple[str, ...], *, top: int = 3, resize: bool = False, engine: str | None = None
) -> dict[str, Any]:
    """What `mdsnn run` says, as JSON values (schema mdsnn.run/1)."""
    import numpy as np

    from mdsnn.export import artifact
    from mdsnn.images import load_pixels
    from mdsnn.kernels import Engine
    from mdsnn.kernels.errors import InputError

    from .options import read_data

    network = artifact.load(path)
    spec = network.input
    if any(image.startswith(artifact.BUILTIN) for image in images):
        if len(images) > 1:
            raise InputError(f"{artifact.BUILTIN}... comes alone, but {len(images)} images were given")
        pixels, _ = read_data(network, images[0])
        names = [f"{images[0]}[{i}]" for i in range(len(pixels))]
    else:
        coding: Any = spec.coding
        pixels, names = load_pixels(
            images, spec.channels, spec.height, spec.width, coding, network.timesteps, resize=resize
        )
    runner = Engine(network, engine)
    result = runner.run(pixels)
    labels = network.labels or tuple(map(str, range(network.classes)))
    samples = []
    for name, logits in zip(names, result.logits, strict=True):
        order = np.argsort(-logits.astype(np.int64), kind="stable")[:top]
        best = [{"class": int(c), "label": labels[c], "logit": int(logits[c])} for c in order]
        samples.append({"name": name, "class": best[0]["class"], "top": best})
    return {"schema": "mdsnn.run/1", "artifact": path, "engine": runner.kernels, "samples": samples}

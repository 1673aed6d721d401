"""The picture of `mdsnn bench --profile`: a bar per operation, its stages stacked, the ceiling marked. One SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
text{font:11px system-ui,sans-serif;fill:#1b1f24}.mute{fill:#5b6570}.page{fill:#fff}.mark{stroke:#1b1f24;stroke-width:2}
.gather{fill:#d9822b}.sums{fill:#2f6db3}.epilogue{fill:#3f9a63}.other{fill:#6f7a86}
@media (prefers-color-scheme:dark){text{fill:#e4e8ec}.mute{fill:#9aa5b1}.page{fill:#14181d}.mark{stroke:#e4e8ec}
.gather{fill:#f0a75b}.sums{fill:#6aa5e8}.epilogue{fill:#6cc48e}.other{fill:#9aa5b1}}
"""
_ROW, _LEFT, _WIDTH = 18, 190, 420


def picture(document: Mapping[str, Any]) -> str:
    """SVG text of a profile, schema mdsnn.profile/1; it needs no other file, and follows light and dark themes."""
    layers: Sequence[Mapping[str, Any]] = document["layers"]
    stages = document["stages"]
    scale = _WIDTH / max([1e-9, *(max(layer["total_ms"], layer["ceiling_ms"]) for layer in layers)])
    parts = []
    for place, stage in enumerate(stages):
        x = _LEFT + 105 * place
        parts.append(f'<rect class="{stage}" x="{x}" y="30" width="10" height="10"/>')
        parts.append(f'<text x="{x + 14}" y="39">{escape(stage)}</text>')
    for place, layer in enumerate(layers):
        y, right = 52 + _ROW * place, float(_LEFT)
        name = layer["name"] if len(layer["name"]) < 30 else "\u2026" + layer["name"][-28:]
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        for stage in stages:
            ms = layer[f"{stage}_ms"]
            title = escape(f"{layer['name']}, {stage}: {ms:.4f} ms")
            parts.append(
                f'<rect class="{stage}" x="{right:.1f}" y="{y}" width="{ms * scale:.1f}" height="13">'
                f"<title>{title}</title></rect>"
            )
            right += ms * scale
        share = f" ({layer['ceiling_share']:.0%})" if layer["ceiling_ms"] else ""
        parts.append(f'<text class="mute" x="{right + 6:.1f}" y="{y + 11}">{layer["total_ms"]:.3f}{share}</text>')
        if layer["ceiling_ms"]:
            at = _LEFT + layer["ceiling_ms"] * scale
            parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 2}" y2="{y + 15}"/>')
    height = 62 + _ROW * len(layers)
    title = (
        f"{document['isa']}: {document['run_ms']:.3f} ms a sample; the mark is the ceiling,"
        f" {document['ceiling_ms']:.3f} ms in all"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" role="img">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f'<rect class="page" width="720" height="{height}"/><text x="8" y="18">{escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )

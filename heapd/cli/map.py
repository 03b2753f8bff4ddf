"""`heapd map [HEAP]`: the arena or one heap as a picture, in the terminal or as SVG."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

import heapd_client as hc
from heapd.cli.params import endpoint_option
from heapd.cli.tables import console, opened
from heapd.wire import Endpoint
from heapd.workloads.arena_picture import picture_of_arena
from heapd.workloads.picture import Picture, cell_size_for, cells_per_line, picture_of_walk, render
from heapd.workloads.svg import CELLS_PER_ROW, draw_svg

__all__ = ["map_"]

_SVG_ROWS = 40


@click.command("map")
@click.argument("heap", required=False)
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write an SVG file instead.")
@endpoint_option
def map_(heap: str | None, svg: Path | None, endpoint: Endpoint) -> None:
    """Draw the arena, or one HEAP (a name or an id): reserved, committed free, busy."""
    columns = console().width
    rows = max(8, shutil.get_terminal_size().lines - 8)
    cells = CELLS_PER_ROW * _SVG_ROWS if svg else cells_per_line(columns) * rows
    with hc.connect(str(endpoint), autostart=False) as session:
        picture = _draw(session, heap, cells)
    if svg is None:
        console().print(render(picture, columns))
        return
    try:
        svg.write_text(draw_svg(picture))
    except OSError as error:
        raise click.FileError(str(svg), error.strerror) from error
    click.echo(f"wrote {svg}")


def _draw(session: hc.Session, heap: str | None, cells: int) -> Picture:
    if heap is None:
        return picture_of_arena(session, cells)
    with opened(session, heap) as found:
        title = f"Heap {found.name or found.id} of {session.endpoint}"
        statistics = found.statistics()
        size = cell_size_for(statistics.reserved, statistics.committed, cells)
        return picture_of_walk(title, session.walk(found.id), size)

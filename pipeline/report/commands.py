"""`alma report`: its options, and where the page goes."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.terminal import byte_size, show

PORT = 7863
LOOPBACK = "127.0.0.1"


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/quickstart.")],
    other: Annotated[Path | None, typer.Argument(help="Another run to compare with.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; by default RUN/report.html.")
    ] = None,
    lang: Annotated[str, typer.Option("--lang", help="Language of the page: en or zh.")] = "en",
    live: Annotated[bool, typer.Option("--live", help="Serve the page while the run goes on; Ctrl-C ends it.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of --live; 0: any free one.")] = PORT,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Cost of a process for an hour.")] = None,
    watts: Annotated[float | None, typer.Option("--watts", min=0, help="Power that a process draws.")] = None,
) -> None:
    """One HTML page about a run, or two compared: chain, curves and what is normal for them, data, masks, samples,
    evaluation, lineage, cost. Also of a run in progress or a failed one. The page needs no network."""
    from pipeline.report.compare import page_of_two
    from pipeline.report.page import Options, packed_plotly, page_of
    from pipeline.report.run_folder import read_run
    from pipeline.report.words import Words

    Words(lang)
    options = Options(lang, price, watts)
    first = read_run(run)
    if live:
        if other or output:
            raise UserError("--live serves one run and writes no file; leave out the second run and --output")
        packed_plotly()
        _serve(run, port, options)
        return
    if other:
        html = page_of_two(first, read_run(other), options)
        target = output or Path(f"report-{first.name}-{other.resolve().name}.html")
    else:
        html = page_of(first, options)
        target = output or run / "report.html"
    try:
        write_atomic(target, html)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give --output FILE") from None
    show(f"{target}: {byte_size(len(html.encode()))}; open it in a browser")


def _serve(path: Path, port: int, options) -> None:
    from dataclasses import replace

    from pipeline.report.live import Pages, server
    from pipeline.report.page import page_of
    from pipeline.report.run_folder import read_run

    pages = Pages(path, lambda version: page_of(read_run(path), replace(options, live=version)))
    with server(pages, LOOPBACK, port) as service:
        show(f"http://{LOOPBACK}:{service.server_address[1]}/ shows {path} while it goes on; Ctrl-C ends it")
        try:
            service.serve_forever()
        except KeyboardInterrupt:
            show("ended")

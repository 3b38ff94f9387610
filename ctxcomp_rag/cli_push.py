"""The command that publishes an index: `ctxcomp push`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import IndexFolder, Json, print_json, to_out


def push(
    index: IndexFolder,
    uri: Annotated[str, typer.Argument(metavar="URI", help="s3://BUCKET/PREFIX.")],
    as_json: Json = False,
) -> None:
    """Publish an index in an object store, for reading there; only what is new is sent.

    Readers see the old version until the new one is whole. Credentials, region and endpoint come from the usual
    variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL. From one machine at a time.
    """
    from ctxcomp_rag.index import MemoryIndex

    with MemoryIndex.open(index) as memory, \
            tqdm(unit="B", unit_scale=True, desc="push", file=sys.stderr, disable=None) as bar:
        def advance(sent: int, total: int) -> None:
            bar.total = total
            bar.update(sent - bar.n)

        report = memory.push(uri, progress=advance)
    if as_json:
        print_json(report.__dict__)
    else:
        to_out.print(f"version {report.version} is at {uri}: {report.uploaded} objects sent "
                     f"({report.uploaded_bytes:,} bytes), {report.unchanged} were there, {report.removed} removed")

"""The command that trains: `ctxcomp train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from ctxcomp_rag.cli_output import Json, print_json, quiet, to_err, to_out


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see recipes/ and docs/training.md.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Replace a setting, such as "
                                                       "stages.0.steps=200; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Train a compressor for a frozen decoder. Run it again to resume: it goes on from the last checkpoint.

    On several GPUs: accelerate launch -m ctxcomp_rag.cli train CONFIG.
    """
    from ctxcomp_rag.training.config import load_config

    chosen = load_config(config, settings or ())
    from ctxcomp_rag.training import run

    quiet()
    last: dict[str, Any] = {}
    with tqdm(total=sum(s.steps for s in chosen.stages), unit="step", file=sys.stderr, disable=None) as bar:
        def show(record: dict[str, Any]) -> None:
            last.update({k: record[k] for k in ("stage", "step", "loss", "held_out") if k in record})
            bar.update()
            bar.set_postfix_str(f"{record['stage']} {record['step']}/{record['steps']} loss {record['loss']:.3f}")
            if record["ended"]:
                bar.clear()
                to_err.print(f"stage {record['stage']!r} ended at step {record['step']}: the held-out loss no longer "
                             "falls")

        def advise(text: str) -> None:
            bar.clear()
            to_err.print(f"advice: {text}")

        def note(text: str) -> None:
            bar.clear()
            to_err.print(text)

        folder = run.train(chosen, show, advise, note)
    if as_json:
        print_json({"compressor": str(folder), "log": str(Path(chosen.out) / "log.jsonl"), **last})
        return
    to_out.print(f"trained: {folder}; try it with ctxcomp eval --compressor {folder} --model {chosen.model}")

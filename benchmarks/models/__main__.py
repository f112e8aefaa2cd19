"""The sweep's command line: one process a type, with a limit of time and memory."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models import page
from benchmarks.models.examine import examine, one_line
from benchmarks.models.sizes import NOT_DECODERS, tiny_config, tiny_model

RESULTS = Path(__file__).parent.parent / "results" / "models.jsonl"
SECONDS, BYTES = 120, 12 << 30


def decoder_types() -> list[str]:
    """The decoder-only types of MODEL_FOR_CAUSAL_LM_MAPPING in this version of transformers."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_DECODERS)


def row_of(model_type: str) -> dict[str, Any]:
    row: dict[str, Any] = dict(
        type=model_type,
        transformers=transformers.__version__,
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
        name=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
    )
    try:
        model = tiny_model(tiny_config(model_type))
        row["name"] = type(model).__name__
        row["parameters"] = sum(p.numel() for p in model.parameters())
    except Exception as exception:
        row["not_built"] = f"{type(exception).__name__}: {one_line(exception)}"
        return row
    examine(model, row)
    return row


def _work(model_type: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        pipe.send(row_of(model_type))
    except BaseException:
        pipe.send({"type": model_type, "not_built": traceback.format_exc()[-300:]})


def in_a_process(model_type: str, seconds: float) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model_type, its))
    process.start()
    its.close()
    try:
        if mine.poll(seconds):
            return mine.recv()
        why = f"over {seconds:.0f} s"
    except EOFError:
        why = f"its process ended (over {BYTES >> 30} GiB, or killed)"
    finally:
        process.kill()
        process.join()
    return {"type": model_type, "transformers": transformers.__version__, "not_built": why}


def done(out: Path) -> set[tuple[str, str]]:
    return {(row["type"], row["transformers"]) for row in page.read(out)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--types", nargs="*", help="model types; by default all decoders")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="also types that have a row")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each type")
    parser.add_argument("--write-docs", action="store_true", help="write docs/models.md and stop")
    options = parser.parse_args()
    if options.write_docs:
        page.write(page.read(options.out))
        return 0
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = set() if options.again else done(options.out)
    bad = 0
    for model_type in options.types or decoder_types():
        if (model_type, transformers.__version__) in known:
            continue
        row = in_a_process(model_type, options.seconds)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        states = [row.get("lens", ""), row.get("attention", "")]
        bad += any(state in ("wrong", "broken") for state in states) or "not_built" in row
        why = row.get("not_built") or row.get("lens_why") or row.get("attention_why", "")
        print(f"{model_type:28} {states[0]:8} {states[1]:8} {why}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())

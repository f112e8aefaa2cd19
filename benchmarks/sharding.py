"""Memory of a training step at Qwen3-0.6B's shape, whole and shared by several processes.

    python -m benchmarks.sharding [--processes 2 4] [--dtype bfloat16] [--out benchmarks/results]

OISD on one student layer, random weights, a micro-batch of 2 rows of 128 tokens on each process,
gradient checkpointing, one thread, gloo. Every process has the same rows, so that the gradient is
that of one process: its norm must agree. Peak resident memory is that of a process during its first
two steps (AdamW makes its moments in the first), less what it had before the model; beside it is
what `oisd plan` computes. The sampling copy has no memory in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout import SHAPE, memory, random_model

ROWS, TOKENS, PROMPT, LAYER = 2, 128, 16, 6
# Of gradient norms, relative; in bfloat16 shards also round norms' weights and embeddings.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}


def main() -> None:
    """Measure, print a table, append rows to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--out", type=Path, help="folder for sharding.jsonl")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.dtype, arguments.layers)
        return
    from benchmarks.measure.machine import append, describe

    rows = []
    for count in (1, *arguments.processes):
        row = _in_processes(count, arguments.dtype, arguments.layers)
        rows.append(row)
        whole = rows[0]
        off = abs(row["grad_norm"] / whole["grad_norm"] - 1)
        if not off < TOLERANCE[arguments.dtype]:
            raise SystemExit(f"WRONG: gradient norms {row['grad_norm']}, {whole['grad_norm']}")
        row["ratio"] = row["peak_mib"] / whole["peak_mib"]
        print(
            f"{count} processes  peak {row['peak_mib']:.0f} MiB each (plan {row['plan_mib']:.0f})  "
            f"{row['ratio']:.3f} of one  gradient norm apart {off:.1e}",
            flush=True,
        )
        if arguments.out:
            append(arguments.out / "sharding.jsonl", [row], describe("cpu", 1))


def _in_processes(count: int, dtype: str, layers: int) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    own = ["-m", "benchmarks.sharding", "--one", "--dtype", dtype, "--layers", str(layers)]
    # By default glibc keeps what is freed of blocks up to 32 MiB, a layer's gathered weights say.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, *(launcher if count > 1 else []), *own],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{count} processes failed:\n{done.stderr[-4000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def measure(dtype: str, layers: int) -> None:
    """Two steps of this process, with the others of its launch; the first prints what it found."""
    torch.set_num_threads(1)
    from oisd.arithmetic import arithmetic_tokenizer
    from oisd.config import from_tables
    from oisd.objective import Objective, Totals
    from oisd.optimizer import Optimizer
    from oisd.plan import Shape, memory_plan
    from oisd.policy import Policy
    from oisd.run.processes import Processes
    from oisd.trainer import learn
    from oisd_kernels.lens.chunked.chunks import DEFAULT_BYTES

    processes = Processes("cpu")
    sharding = "fsdp2" if processes.size > 1 else "none"
    config = from_tables(
        {
            "model": {"dtype": dtype, "gradient_checkpointing": True},
            "data": {"max_prompt_tokens": PROMPT},
            "rollout": {"max_completion_tokens": TOKENS - PROMPT, "batch_size": 1},
            "oisd": {"student_layers": [min(LAYER, layers - 1)]},
            "run": {"tokens_per_microbatch": ROWS * TOKENS, "sharding": sharding},
        }
    )
    before = memory("VmRSS")
    model = random_model(SHAPE | {"num_hidden_layers": layers})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model.train(), arithmetic_tokenizer(), getattr(torch, dtype))
    objective = Objective(policy, config)
    if processes.size > 1:
        objective.split()
    optimizer = Optimizer(model, config, processes)
    batch = batch_of_rows()
    count = processes.size
    totals = Totals(ROWS * count, int(batch.predicts.sum()) * count)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    norms = [learn(objective, optimizer, [(batch, totals)], s)[1]["grad_norm"] for s in range(2)]
    peak = processes.gather(memory("VmHWM") - before)
    shape = Shape(layers, 1024, 3072, 16, 8, 128, 151936, True, True)
    plan = memory_plan(config, shape, count)
    workspace = DEFAULT_BYTES["cpu"] - DEFAULT_BYTES["cuda"]
    if processes.is_first:
        found = {
            "processes": count, "dtype": dtype, "layers": layers, "grad_norm": norms[0],
            "peak_mib": max(peak) / 2**20, 
            "plan_mib": (plan.held + sum(plan.update.values()) + workspace) / 2**20,
        }  # fmt: skip
        print(json.dumps(found))
    processes.close()


def batch_of_rows() -> Any:
    """Two completions of random tokens, of opposite advantages."""
    from oisd.batch import assemble
    from oisd.rollout import Completions

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (ROWS, TOKENS), generator=generator)
    lengths = torch.full((ROWS,), TOKENS - PROMPT + 1)
    logprobs = torch.full((ROWS, TOKENS - PROMPT + 1), -11.9)
    sampled = Completions(ids[:, PROMPT - 1 :], logprobs, lengths, lengths > 0)
    prompts = [row[:PROMPT].tolist() for row in ids]
    return assemble(prompts, sampled, torch.tensor([1.0, -1.0]), range(ROWS), 0)


if __name__ == "__main__":
    main()

"""Rollouts: decoding from a copy in bfloat16, and one prefill for the completions of a prompt.

    python -m benchmarks.rollout [--case prefill] [--against CHECKOUT] [--rounds 1] [--out FOLDER]

"copy", at Qwen3-0.6B's shape: decoding from the copy, and from float32 parameters under autocast.
8 rows of 24 tokens after prompts of 16, random weights, two CPU threads. Each measurement is a
process of its own, in turns. "autocast" rounds float32 parameters in each forward, as rollouts did
before there was a copy; with --against it runs the sampler of another checkout. "copy" is what a
run does: fill the copy from the float32 parameters, sample, give the memory back.

The times are of the processor, all threads together, because a machine that others use too makes
the clock's times long. Peak memory is that of the process less what it had before the model, beside
`oisd plan`. Both must sample like the float32 model: where they take the same token, its log-prob
may differ by rounding alone.

"prefill": 8 completions of 16 tokens for one prompt of 512, by a Qwen3 of 4 layers and width 256 in
float32 on one thread, with a prefill for each row ("apart") and with one for all ("shared"). Counts
the tokens of prompts that the model reads. Tokens must be the same, and log-probs within 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

ROWS, PROMPT, TOKENS, THREADS = 8, 16, 24, 2
SHAPE = dict(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    max_position_embeddings=40960, eos_token_id=151935, pad_token_id=0,
)  # fmt: skip
KINDS = ("autocast", "copy")
SMALL = SHAPE | dict(
    vocab_size=32000, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, eos_token_id=31999,
)  # fmt: skip
LONG_PROMPT, FEW_TOKENS = 512, 16
# A larger mean difference (nats) of the log-prob of the same token is no rounding.
TOLERANCE = 0.05


def main() -> None:
    """Measure, print a table, append rows to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("copy", "prefill"), default="copy")
    parser.add_argument("--against", type=Path, help="a checkout whose sampler is measured too")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for rollout.jsonl")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    if arguments.case == "prefill":
        prefill_case(arguments.rounds, arguments.out)
        return
    from benchmarks.measure.machine import ROOT, append, describe

    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            code = arguments.against if kind == "autocast" and arguments.against else ROOT
            found[kind].append(_in_a_process(kind, Path(code).resolve()))
    autocast, copied = found["autocast"], found["copy"]
    apart = difference(autocast[0], copied[0])
    if not apart < TOLERANCE:
        raise SystemExit(f"WRONG: log-probs of the same tokens are {apart:.3f} nats apart")
    rows = [summary(kind, rows) for kind, rows in found.items()]
    for row in rows:
        print(
            "{kind:8}  {cpu_s:6.2f} s of processor ({fill_s:.2f} to fill)  cache {cache_mib:.1f} "
            "MiB  peak {peak_mib:.0f} MiB (plan {plan_mib:.0f})".format(**row)
        )
    ratio, cache = (rows[1][name] / rows[0][name] for name in ("cpu_s", "cache_mib"))
    print(f"copy / autocast: time {ratio:.2f}, cache {cache:.2f}; {apart:.4f} nats apart")
    if arguments.out:
        append(arguments.out / "rollout.jsonl", rows, describe("cpu", THREADS))


def prefill_case(rounds: int, out: Path | None) -> None:
    """Measure in turns, after a round that is not counted; print a table and append rows."""
    from oisd.rollout import generate, sample

    torch.set_num_threads(1)
    model: Any = random_model(SMALL)
    prompts = [[(7 * i) % 1000 + 5 for i in range(LONG_PROMPT)]] * ROWS
    settings: dict[str, Any] = {"pad_token_id": 0, "eos_token_ids": [SMALL["eos_token_id"]]}
    read: list[int] = []

    def count(module: Any, given: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        read.append(ids.numel() if ids.shape[1] > 1 else 0)

    model.register_forward_pre_hook(count, with_kwargs=True)
    may_share = generate.can_share
    assert may_share(model)
    spent: dict[str, list[float]] = {"apart": [], "shared": []}
    tokens, made = dict.fromkeys(spent, 0), {}
    for number in range(1 + rounds):
        for kind, times in spent.items():
            generate.can_share = may_share if kind == "shared" else lambda _: False
            read.clear()
            start = time.process_time()
            made[kind] = sample(
                model, prompts, range(ROWS), max_completion_tokens=FEW_TOKENS, **settings
            )
            if number > 0:
                times.append(time.process_time() - start)
            tokens[kind] = sum(read)
    one, other = made["shared"], made["apart"]
    apart = float((one.logprobs - other.logprobs).abs().max())
    if not (torch.equal(one.ids, other.ids) and apart < 1e-5):
        raise SystemExit(f"WRONG: other tokens, or log-probs that are {apart:.2g} nats apart")
    rows = [
        {"kind": kind, "cpu_s": statistics.median(times), "least_s": min(times),
         "prefill_tokens": tokens[kind], "apart_nats": apart, "rounds": rounds}
        for kind, times in spent.items()
    ]  # fmt: skip
    for row in rows:
        print("{kind:6}  {cpu_s:6.3f} s of processor  {prefill_tokens} tokens read".format(**row))
    ratios = [a / b for a, b in zip(spent["shared"], spent["apart"], strict=True)]
    print(f"shared / apart: time {statistics.median(ratios):.2f}; {apart:.1e} nats apart")
    if out:
        from benchmarks.measure.machine import append, describe

        append(out / "rollout.jsonl", rows, describe("cpu", 1))


def _in_a_process(kind: str, code: Path) -> dict[str, Any]:
    """What `measure` finds with the packages of a checkout."""
    # Threads that wait must not count as work.
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(Path(__file__).resolve()), "--one", kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str) -> dict[str, Any]:
    """Times, bytes, tokens and log-probs of one kind, in this process."""
    torch.set_num_threads(THREADS)
    from oisd.rollout import sample

    prompts = [[(7 * row + i) % 1000 + 5 for i in range(PROMPT)] for row in range(ROWS)]
    model: Any = random_model(SHAPE | {"num_hidden_layers": 1, "vocab_size": 2000})
    settings: dict[str, Any] = {"pad_token_id": 0, "eos_token_ids": [SHAPE["eos_token_id"]]}

    def decode(model: Any, tokens: int) -> Any:
        mixed = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()
        with mixed:
            return sample(model, prompts, range(ROWS), max_completion_tokens=tokens, **settings)

    decode(model, 2)  # libraries get their own buffers
    before = memory("VmRSS")
    model = random_model(SHAPE)
    copied = None
    if kind == "copy":
        from oisd.rollout.model_copy import ModelCopy

        copied = ModelCopy(model, torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.process_time()
    sampler = copied.fill() if copied else model
    fill = time.process_time() - start
    made = decode(sampler, TOKENS)
    if copied:
        copied.release()
    spent = time.process_time() - start
    peak = memory("VmHWM") - before
    if copied:
        sampler = copied.fill()
    with torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext():
        kept = sampler.generate(
            torch.tensor(prompts),
            max_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
        ).past_key_values
    # Of the same length as the cache of the run that is timed.
    tensors = [t for layer in kept.layers for t in (layer.keys, layer.values)]
    cache = sum(t.nbytes for t in tensors) // kept.get_seq_length() * (PROMPT + TOKENS)
    return {
        "cpu_s": spent, "fill_s": fill, "cache_mib": cache / 2**20, "peak_mib": peak / 2**20,
        "ids": made.ids.tolist(), "logprobs": made.logprobs.tolist(),
        "dtypes": sorted({str(t.dtype) for t in tensors}),
    }  # fmt: skip


def random_model(shape: dict[str, Any]) -> Any:
    """A Qwen3 of random float32 weights, the same in each process."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config: Any = Qwen3Config(**shape)
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.uniform_(-0.06, 0.06)
        for name in ("inv_freq", "original_inv_freq"):
            steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
            setattr(model.model.rotary_emb, name, 1e-4**steps)
    return model


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Mean difference (nats) of log-probs, up to where two rows first take different tokens."""
    apart = []
    for i in range(ROWS):
        for a, b, p, q in zip(
            ours["ids"][i], theirs["ids"][i], ours["logprobs"][i], theirs["logprobs"][i],
            strict=True,
        ):  # fmt: skip
            if a != b:
                break
            apart.append(abs(p - q))
    return statistics.mean(apart) if len(apart) >= ROWS else float("inf")


def summary(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians, beside what `oisd plan` computes."""
    from oisd.plan import Shape, rollout_parts

    shape = Shape(28, 1024, 3072, 16, 8, 128, 151936, True, True)
    half = kind == "copy"
    parts = rollout_parts(shape, half, ROWS, ROWS * (PROMPT + TOKENS))
    if not half:
        parts["weights that autocast keeps"] = 2 * shape.parameters
    plan = 4 * shape.parameters + sum(parts.values())
    names = ("cpu_s", "fill_s", "cache_mib", "peak_mib")
    medians = {name: statistics.median(row[name] for row in rows) for name in names}
    return {"kind": kind, **medians, "plan_mib": plan / 2**20, "rounds": len(rows),
            "dtypes": rows[0]["dtypes"]}  # fmt: skip


def memory(name: str) -> int:
    """Bytes, from the kernel's table of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()

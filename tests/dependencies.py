"""What we rely on in each dependency, and whether the installed version still has it.

    .venv-newest/bin/python -m tests.dependencies              # a line for each package
    .venv-newest/bin/python -m tests.dependencies --accept     # after a look: these forms are fine

A line has the version that `constraints.txt` tests, the one that is installed, the newest one of
the package index, and what has changed. Functions are held to their parameters with defaults,
constants to their value, and what a signature does not show to the outcome of a small run.
`tests/data/dependencies.json` has the forms that we have seen and that work: usually one, more
where versions differ and our code takes both. Exit status 1 if something has changed.

`python -m tests.versions newest` makes such an environment. Packages that it lacks, as verl, which
has an environment of its own, are shown as not installed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from tests import DATA, ROOT
from tests.versions import released

KNOWN = DATA / "dependencies.json"

# Private, fragile, or called by us with parameters that another version may not have.
RELIED_ON: dict[str, tuple[str, ...]] = {
    "torch": (
        "torch.library.custom_op",
        "torch._library.custom_ops.CustomOpDef.register_fake",
        "torch._library.custom_ops.CustomOpDef.register_autograd",
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch._C._distributed_c10d._resolve_process_group",
        "torch._C._current_graph_task_id",
        "torch._guards.detect_fake_mode",
        "torch.autograd.forward_ad._current_level",
        "torch.autograd.forward_ad.unpack_dual",
        "torch.overrides.TorchFunctionMode.__torch_function__",
        "torch.amp.is_autocast_available",
        "torch.get_autocast_dtype",
        "torch.random.fork_rng",
        "torch.distributed.fsdp.fully_shard",
        "torch.distributed.fsdp.MixedPrecisionPolicy",
        "torch.distributed.fsdp.FSDPModule.reshard",
        "torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor",
        "torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms",
        "torch.distributed.tensor.distribute_tensor",
        "torch.distributed.tensor.DTensor.full_tensor",
        "torch.distributed.checkpoint.state_dict_loader.load",
        "torch.distributed.checkpoint.state_dict_saver.save",
        "torch.distributed.checkpoint.api.CheckpointException",
        "torch.utils.tensorboard.SummaryWriter.add_scalar",
    ),
    "triton": (
        "triton.compile",
        "triton.compiler.compiler.ASTSource",
        "triton.compiler.compiler.make_backend",
        "triton.backends.compiler.GPUTarget",
        "triton.runtime.jit.create_function_from_signature",
        "triton.runtime.jit.JITFunction._pack_args",
        "triton.runtime.jit.JITFunction.run",
        "triton.runtime.jit.JITFunction.parse",
        "triton.runtime.interpreter.GridExecutor.__call__",
        "triton.language.dot",
        "triton.language.load",
        "triton.language.atomic_add",
    ),
    "transformers": (
        "transformers.AttentionInterface.register",
        "transformers.AttentionMaskInterface.register",
        "transformers.masking_utils.sdpa_mask",
        "transformers.masking_utils.causal_mask_function",
        "transformers.models.qwen3.modeling_qwen3.eager_attention_forward",
        "transformers.models.qwen3.modeling_qwen3.Qwen3Attention.forward",
        "transformers.PreTrainedModel.set_attn_implementation",
        "transformers.PreTrainedModel.get_output_embeddings",
        "transformers.generation.continuous_batching.ContinuousBatchingManager",
        "transformers.generation.continuous_batching.ContinuousBatchingManager.add_request",
        "transformers.generation.continuous_batching.ContinuousBatchingManager.destroy",
        "transformers.generation.continuous_batching.ContinuousBatchingManager"
        "._run_generation_loop",
        "transformers.ContinuousBatchingConfig",
        "transformers.LogitsProcessor.__call__",
        "transformers.generation.logits_process.TemperatureLogitsWarper",
        "transformers.generation.logits_process.TopPLogitsWarper",
        "transformers.Cache.reorder_cache",
        "transformers.DynamicCache",
        "transformers.get_scheduler",
    ),
    "peft": (
        "peft.get_peft_model",
        "peft.get_peft_model_state_dict",
        "peft.utils.load_peft_weights",
        "peft.PeftModel.from_pretrained",
        "peft.PeftModel.save_pretrained",
        "peft.PeftModel.disable_adapter",
        "peft.PeftModel.get_base_model",
        "peft.tuners.lora.layer.Linear.get_delta_weight",
    ),
    "trl": (
        "trl.GRPOTrainer",
        "trl.GRPOTrainer.compute_loss",
        "trl.GRPOTrainer.loss_is_scaled_for_ga",
        "trl.GRPOTrainer.training_step",
        "trl.GRPOTrainer.log",
        "trl.trainer.distillation_trainer._chunked_divergence_loss",
        "trl.trainer.distillation_trainer.ChunkedDivergenceFunction.forward",
    ),
    "verl": (
        "verl.trainer.ppo.core_algos.agg_loss",
        "verl.utils.tensordict_utils.get_non_tensor_data",
        "verl.utils.metric.Metric",
        "verl.workers.config.FSDPEngineConfig",
        "verl.workers.engine.base.EngineRegistry.register",
        "verl.workers.engine.fsdp.FSDPEngineWithLMHead",
        "verl.workers.engine.fsdp.FSDPEngineWithLMHead._build_model_optimizer",
        "verl.workers.engine.fsdp.FSDPEngineWithLMHead.forward_step",
        "verl.workers.engine.fsdp.FSDPEngineWithLMHead.forward_backward_batch",
        "verl.workers.utils.padding.no_padding_2_padding",
    ),
    "accelerate": (
        "accelerate.logging.get_logger",
        "accelerate.Accelerator.reduce",
    ),
    "datasets": (
        "datasets.load_dataset",
        "datasets.load_from_disk",
        "datasets.load_dataset_builder",
        "datasets.ReadInstruction.from_spec",
    ),
    "liger-kernel": (
        "liger_kernel.transformers.fused_linear_jsd.LigerFusedLinearJSD",
        "liger_kernel.transformers.functional.liger_fused_linear_jsd",
    ),
    "math-verify": ("math_verify.parse", "math_verify.LatexExtractionConfig"),
    "mpmath": ("mpmath.ctx_mp.MPContext",),
    "pebble": ("pebble.ProcessPool", "pebble.ProcessPool.schedule", "pebble.ProcessExpired"),
    "tyro": ("tyro.cli", "tyro.conf.FlagConversionOff"),
    "rich": ("rich.table.Table.add_column", "rich.progress.track"),
}


def slope_of_clamp_at_its_bound() -> str:
    import torch

    x = torch.ones(1, requires_grad=True)
    x.clamp(-1, 1).sum().backward()
    assert x.grad is not None
    return str(x.grad.item())


def arguments_of_attention() -> str:
    """What a model passes to a registered attention function and to its mask function."""
    import torch
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    seen: dict[str, list[str]] = {}

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen["attention"] = sorted(options)
        return query.transpose(1, 2), None

    def mask(**options: Any) -> None:
        seen["mask"] = sorted(options)

    AttentionInterface.register("dependencies", attend)
    AttentionMaskInterface.register("dependencies", mask)
    config = Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="dependencies")
    model(torch.zeros(1, 2, dtype=torch.long))
    return json.dumps(seen, sort_keys=True)


def names_of_paged_attention() -> str:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return " ".join(sorted(name for name in ALL_ATTENTION_FUNCTIONS if "paged" in name))


def options_of_grpo() -> str:
    """Which of the options that we read, and of the names that we add, GRPOConfig has."""
    from dataclasses import fields

    from trl import GRPOConfig

    read = {"disable_dropout", "cast_lm_head_to_fp32", "gradient_checkpointing_kwargs"}
    read |= {"gradient_checkpointing", "seed", "parallelism_config"}
    return " ".join(sorted(read & {field.name for field in fields(GRPOConfig)}))


def a_half_in_a_box() -> str:
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0)
    return repr(parse(r"$\boxed{\frac12}$", [config], "no_fallback", parsing_timeout=None))


BEHAVIOURS: dict[str, tuple[Callable[[], str], ...]] = {
    "torch": (slope_of_clamp_at_its_bound,),
    "transformers": (arguments_of_attention, names_of_paged_attention),
    "trl": (options_of_grpo,),
    "math-verify": (a_half_in_a_box,),
}


def resolve(name: str) -> Any:
    """The object of a dotted name: the longest module that it begins with, then attributes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # of something that the module imports
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AttributeError(f"no module {parts[0]}")


def form(name: str) -> str:
    """The parameters of a function with their defaults; for anything else its value."""
    found = resolve(name)
    if not callable(found):
        return repr(found)
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # of C++, whose signature is in the first line of its docstring, if anywhere
        return (inspect.getdoc(found) or "callable").splitlines()[0]
    text = ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)
    return re.sub(r" at 0x[0-9a-f]+| from '[^']*'", "", text)  # addresses and paths


def forms(package: str) -> dict[str, str]:
    """Of all that we rely on in a package; an error's text for what is gone."""
    found = {}
    asked: dict[str, Callable[[], str]] = {
        name: lambda name=name: form(name) for name in RELIED_ON[package]
    }
    asked |= {run.__name__: run for run in BEHAVIOURS.get(package, ())}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except Exception as error:  # whatever another version raises
            found[name] = f"GONE: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def changed(now: str, known: list[str]) -> str:
    """What a new form lacks and has more than the known one that is nearest."""
    if now.startswith("GONE") or not known:
        return now
    after = now.split(", ")

    def difference(form: str) -> list[str]:
        before = form.split(", ")
        less = [f"-{part}" for part in before if part not in after]
        return less + [f"+{part}" for part in after if part not in before]

    nearest = min(map(difference, known), key=len)
    return " ".join(nearest) or f"another order: {now}"


class Line(NamedTuple):
    """A package's versions, and what has changed, by name."""

    package: str
    tested: str
    here: str
    newest: str
    checked: int
    changes: dict[str, str]

    def __str__(self) -> str:
        found = f"{self.checked} as known" if self.checked else "not installed"
        if self.changes:
            found = f"{len(self.changes)} of {self.checked} changed: " + "; ".join(
                f"{name} {change}" for name, change in self.changes.items()
            )
        versions = f"{self.tested:>8} tested {self.here:>10} here {self.newest:>8} newest"
        return f"{self.package:<13} {versions}   {found}"


def pinned(package: str) -> str:
    """The version in constraints.txt, "-" for none."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(package)}==(\S+)$", pins, re.MULTILINE)
    return found[1] if found else "-"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def newest(package: str) -> str:
    try:
        return str(max(released(package)))
    except (subprocess.CalledProcessError, RuntimeError):
        return "?"  # no package index


def look(package: str, known: Mapping[str, list[str]], index: bool) -> Line:
    """A package's line. known: the forms of each name that work."""
    here = installed(package)
    found = forms(package) if here else {}
    changes = {
        name: changed(now, known.get(name, []))
        for name, now in found.items()
        if now not in known.get(name, [])
    }
    latest = newest(package) if index else "-"
    return Line(package, pinned(package), here or "-", latest, len(found), changes)


def accept(known: dict[str, dict[str, list[str]]]) -> None:
    """Adds the forms of the installed versions, but not what is gone."""
    for package in RELIED_ON:
        found = forms(package) if installed(package) else {}
        own = known.setdefault(package, {})
        names = [*found] or [*own]
        known[package] = {name: own.get(name, []) for name in names}
        for name, now in found.items():
            if now not in known[package][name] and not now.startswith("GONE"):
                known[package][name].append(now)
    KNOWN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dependencies", description=__doc__)
    parser.add_argument("--accept", action="store_true", help="keep the forms found here")
    parser.add_argument("--offline", action="store_true", help="do not ask the package index")
    arguments = parser.parse_args(options)
    known = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}
    if arguments.accept:
        accept(known)
    lines = [look(package, known.get(package, {}), not arguments.offline) for package in RELIED_ON]
    print(*lines, sep="\n")
    return int(any(line.changes for line in lines))


if __name__ == "__main__":
    sys.exit(main())

"""Runs a peer's own test file against `oisd_kernels.drop_in`.

    python -m tests.run_peer_suite PATH [pytest's options]

PATH is `test/transformers/test_fused_linear_jsd.py` of Liger Kernel's source distribution, or
`tests/test_distillation_trainer.py` of TRL's repository at the tag of the installed version
(`-k TestChunkedDivergenceLoss` for the loss alone). The peer must be installed: its modules are
given our functions before the file imports them, and nothing else is changed. Without a GPU set
TRITON_INTERPRET=1 for what a file calls of Liger's own kernels; TRL skips these tests there, unless
`--on-cpu` is given.
"""

import argparse
import importlib.util
import sys

import pytest

from oisd_kernels import drop_in

REPLACED = {
    "liger_kernel.transformers": {"LigerFusedLinearJSD": drop_in.LigerFusedLinearJSD},
    "liger_kernel.transformers.fused_linear_jsd": {
        "LigerFusedLinearJSD": drop_in.LigerFusedLinearJSD
    },
    "liger_kernel.transformers.functional": {
        "liger_fused_linear_jsd": drop_in.liger_fused_linear_jsd
    },
    "trl.trainer.distillation_trainer": {
        "_chunked_divergence_loss": drop_in.chunked_divergence_loss,
        "ChunkedDivergenceFunction": drop_in.ChunkedDivergenceFunction,
    },
}


def replace() -> list[str]:
    """Puts ours in the place of theirs -> what was replaced."""
    done = []
    for name, functions in REPLACED.items():
        if importlib.util.find_spec(name.split(".")[0]) is None:
            continue
        module = importlib.import_module(name)
        for attribute, ours in functions.items():
            assert hasattr(module, attribute), f"{name} has no {attribute} any more"
            setattr(module, attribute, ours)
            done.append(f"{name}.{attribute}")
    return done


def run_on_cpu() -> None:
    """transformers' decorator, which TRL's tests use, lets a test run without an accelerator."""
    import transformers.testing_utils

    transformers.testing_utils.require_torch_accelerator = lambda test: test


def main() -> int:
    parser = argparse.ArgumentParser(description="A peer's test file against our drop-ins")
    parser.add_argument("path")
    parser.add_argument("--on-cpu", action="store_true")
    arguments, options = parser.parse_known_args()
    if arguments.on_cpu:
        run_on_cpu()
    print("replaced:", *replace(), sep="\n    ")
    return pytest.main([arguments.path, "-c", "/dev/null", *options])


if __name__ == "__main__":
    sys.exit(main())

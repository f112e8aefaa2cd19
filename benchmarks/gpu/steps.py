"""The queue: every step in order of worth, with its limit and what its outcome decides."""

from __future__ import annotations

from benchmarks.gpu.watch import Step

GPU = "benchmarks.gpu"


def _together(name: str, work: str, seconds: float, decides: str, **more) -> Step:
    # A first check compiles several kernels, while others do, too.
    more.setdefault("silent", 100)
    return Step(name, f"{GPU}.{work}", seconds, together=True, decides=decides, **more)


def _alone(name: str, work: str, seconds: float, decides: str, **more) -> Step:
    return Step(name, f"{GPU}.{work}", seconds, decides=decides, **more)


CORRECT = [
    _together("machine", "facts:machine", 60, "what the results may be said of"),
    _together("correct: lens, chunked", "lens_checks:chunked", 130, '"auto" of the lens stays'),
    _together("correct: attention", "attention_checks:attention", 130,
              '"auto" of flash_attention stays "triton"'),
    _together("correct: attention divergence", "attention_checks:divergences", 130,
              '"auto" of attention_divergence stays "triton"'),
    _together("correct: facts", "facts:facts", 130, "the contract: no waits, the same bits"),
    _together("correct: lens, tiled", "lens_checks:tiled", 130, 'impl="tiled" may be advised'),
    _together("correct: float32", "facts:float32", 130, "float32 by tf32x3 keeps its bounds"),
    _together("correct: lens, split rows", "facts:split_rows", 130, "whether they are timed"),
    _together("correct: 250 registers", "facts:registers", 130, "those tiles stay in the tables"),
]  # fmt: skip
HEADLINES = [
    _alone("time: lens, S = 1", "headlines:lens_one", 70, "bars 1 and 2: roofline, rivals"),
    _alone("time: attention backward", "headlines:backward", 60, "bar 4: fused over plain"),
    _alone("time: step", "headlines:step", 120, "bar 5: OISD for the price of GRPO", least=45),
    _alone("time: lens, S = 4", "headlines:lens_four", 70, "bar 1 at S = 4"),
    _alone("time: attention", "headlines:plain", 45, "bar 4: plain over SDPA flash and cuDNN"),
]
BUILD = "csrc: build"
ENGINES = ("WARP_ENGINE", "WARPGROUP_ENGINE", "SPECIALIZED_ENGINE")
WORKS = ("warp_tests", "warpgroup_tests", "specialized_tests")
CSRC = [
    Step(BUILD, f"{GPU}.csrc:compile_units", 300, background=True, silent=300,
         decides='impl="cuda" builds here'),
    *(_together(f"csrc: tests of {engine}", f"csrc:{work}", 90,
                f"WARPGROUPS with {engine}" if place else 'impl="cuda" is right',
                after=(BUILD,))
      for place, (engine, work) in enumerate(zip(ENGINES, WORKS, strict=True))),
    _together("tiles: check", "sweep:check", 120, "which tiles are timed"),
    _alone("csrc: times", "csrc:times", 50, '"auto" becomes "cuda" where it is faster',
           after=(BUILD,)),
]  # fmt: skip
TILES = [_alone("tiles: times", "sweep:time", 50, "the tables: tiles.json")]
REST = [
    _alone("time: lens, split rows", "headlines:split_rows", 60, "which row kernels are chosen",
           after=("correct: lens, split rows",)),
    _alone("time: policy head", "headlines:policy_head", 50, "one pass over the head, or two"),
    _alone("time: log-probability", "headlines:logprob", 50, '"chunked" or "tiled"'),
    _alone("time: attention divergence", "headlines:divergence", 40, "the separate form"),
    _alone("time: lens, 1k tokens", "headlines:short_lens", 30, "short completions"),
    _alone("time: lens, other projects", "headlines:others", 60, "bar 2 beyond Liger and TRL"),
    _together("tests", "csrc:remaining_tests", 150, "the suite on a GPU", silent=150),
    _together("csrc: reruns", "csrc:reruns", 60, "the same bits in 250 runs", after=(BUILD,)),
    _together(
        "csrc: memory checker", "csrc:memory_checker", 90, "no access outside", after=(BUILD,)
    ),
]  # fmt: skip

STEPS = [CSRC[0], *CORRECT, *HEADLINES, *CSRC[1:], *TILES, *REST]

"""The CUDA kernels of csrc/: emulated on a CPU from their own source, and on a GPU if there is one.

Emulated (see csrc/emulator/emulate.h) the kernels prove their masks, offsets, lanes, swizzle,
barriers and the host's arguments. What only a GPU shows is tested where there is one.
"""

import ctypes
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from oisd_kernels.attention import cuda_impl
from oisd_kernels.attention.spec import Alignment, Layer
from oisd_kernels.cuda import build, params
from oisd_kernels.cuda.build import Unit
from tests.oisd_kernels.cuda import emulation
from tests.oisd_kernels.cuda.csrc_cases import (
    CASES,
    GRADIENT_BOUND,
    LOSS_BOUND,
    MACHINES,
    ON_HOPPER,
    STEEP_BOUND,
    SWEEP,
    TINY,
    Inputs,
    by_engine,
    check_case,
    check_close,
    check_dropped_rows,
    check_nan_stays,
    emulate,
    guarded,
    needs_emulation,
    set_up,
)


@pytest.fixture
def emulator(monkeypatch) -> emulation.Emulator:
    return emulate(monkeypatch)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, machine, monkeypatch):
    set_up(machine, monkeypatch, *case.gpu)
    check_case(case, machine)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_every_unit_against_float64(case, machine, monkeypatch):
    set_up(machine, monkeypatch, *case.gpu)
    check_case(case, machine)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", ["align", "fused"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7]], ids=str)
def test_dropped_rows_may_hold_anything(case, kind, machine, monkeypatch):
    set_up(machine, monkeypatch, *case.gpu)
    check_dropped_rows(case, kind, machine)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7]], ids=str)
def test_a_nan_stays_in_its_sequence(case, machine, monkeypatch):
    set_up(machine, monkeypatch, *case.gpu)
    check_nan_stays(case, machine)


@by_engine
@pytest.mark.parametrize("machine", MACHINES)
def test_equal_maps_and_disjoint_ones(machine, gpu, monkeypatch):
    set_up(machine, monkeypatch, *gpu)
    inputs = Inputs(replace(CASES[0], lengths=(90,)), machine)
    inputs.q_teacher, inputs.k_teacher, inputs.scale_teacher = inputs.q, inputs.k, inputs.scale
    answers = inputs.answers()
    value, statistic = inputs.statistics(answers, None)
    assert value.abs().max() <= TINY
    assert (statistic - math.log(2)).abs().max() <= LOSS_BOUND * math.log(2)  # softplus(0)

    inputs.q_teacher = guarded(-8 * inputs.q)
    inputs.scale = inputs.scale_teacher = 1.0
    answers = inputs.answers()
    assert answers["value"][60:].min() > 0.999 * math.log(2)
    value, statistic = inputs.statistics(answers, None)
    check_close(value, answers["value"], STEEP_BOUND, "value")


@needs_emulation
def test_float16_gradients_do_not_underflow(emulator):
    inputs = Inputs(replace(CASES[4], lengths=(100,)))
    inputs.weight = 1e-2 * inputs.weight
    answers = inputs.answers()
    _, statistic = inputs.statistics(answers, None)
    for x, wanted in zip(
        inputs.backward(answers, "align", statistic), answers["align"], strict=True
    ):
        assert wanted.norm() > 1e-6
        # The result itself is rounded to float16, the smallest of which is 6e-8.
        noise = 3e-8 * math.sqrt(wanted.numel())
        assert (x.double() - wanted).norm() <= GRADIENT_BOUND * wanted.norm() + noise


def results_in_order(case, order: int, monkeypatch) -> list[Tensor]:
    emulator = emulate(monkeypatch, *case.gpu)
    emulator.order = order
    inputs = Inputs(case)
    answers = inputs.answers()
    value, statistic = inputs.statistics(answers, inputs.weight != 0)
    results = [value, statistic]
    for kind in ("align", "plain", "fused"):
        results += inputs.backward(answers, kind, statistic)
    return results


@needs_emulation
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7]], ids=str)
def test_the_order_of_warps_and_blocks_does_not_matter(case, monkeypatch):
    """Else a barrier is missing."""
    forward, backward = (results_in_order(case, order, monkeypatch) for order in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(forward, backward, strict=True))


@needs_emulation
@pytest.mark.slow
@pytest.mark.parametrize("case", ON_HOPPER, ids=str)
def test_any_order_of_warps_and_copies(case, monkeypatch):
    case = replace(case, lengths=(70, 140, 5))
    first = results_in_order(case, 0, monkeypatch)
    for seed in range(1000, 16000, 1000):
        again = results_in_order(case, seed, monkeypatch)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)), seed


@needs_emulation
def test_tiles_without_weight_are_not_copied(monkeypatch):
    """Counted in boxes of 64 rows and 64 columns: a tensor's own tile is 4, a streamed one 2."""
    emulator = emulate(monkeypatch, *CASES[7].gpu)
    inputs = Inputs(replace(CASES[7], heads=(1, 1, 1), lengths=(192,)))
    answers = inputs.answers()
    inputs.weight[:] = 0
    inputs.weight[130] = 1e-2
    _, statistic = inputs.statistics(answers, inputs.weight != 0)
    assert emulator.boxes["statistics"] == 2 * (4 + 3 * 2)  # the last queries, all keys
    inputs.backward(answers, "align", statistic)
    assert emulator.boxes["backward_keys_align"] == 2 * 2 * (4 + 2)  # all keys, the last queries
    assert emulator.boxes["backward_queries_align"] == 2 * (4 + 3 * 2)
    inputs.backward(answers, "fused", statistic)
    # Keys 0 to 127 meet three tiles of queries, and the others one; the teacher's are of one alone.
    assert emulator.boxes["backward_keys_fused"] == 2 * 3 * 4 + 2 * (3 + 1) * 2 + (1 + 1) * 2
    inputs.weight[130] = 0
    for kernel in ("align", "fused"):
        inputs.backward(answers, kernel, statistic)
    assert emulator.boxes["backward_keys_align"] == emulator.boxes["backward_queries_align"] == 0
    assert emulator.boxes["backward_keys_fused"] == 2 * 3 * 4 + 2 * (3 + 1) * 2


@needs_emulation
def test_several_students_meet_one_teacher(emulator):
    inputs = Inputs(replace(CASES[0], lengths=(20,)))
    answers = inputs.answers()
    layers = [torch.stack((x, 0.5 * x)) for x in (inputs.q, inputs.k)]
    lse = torch.stack([inputs.eager(q.double(), k.double(), k.double(), inputs.scale)[1].float()
                       for q, k in zip(*layers, strict=True)])  # fmt: skip
    rest = (inputs.teacher(answers), None, "jsd", 0.5, inputs.geometry())
    value, statistic = cuda_impl.statistics(Layer(*layers, lse, inputs.scale), *rest)
    assert value.shape == (2, 20) and statistic.shape == (2, 2, 20)
    second = Layer(layers[0][1:], layers[1][1:], lse[1:], inputs.scale)
    single = cuda_impl.statistics(second, *rest)
    assert torch.equal(value[1], single[0][0]) and torch.equal(statistic[1], single[1][0])
    assert not torch.equal(value[0], value[1])


@needs_emulation
def test_no_tokens(emulator):
    inputs = Inputs(replace(CASES[0], lengths=(0, 0)))
    empty = torch.empty(2, 0)
    teacher = Layer(inputs.q_teacher, inputs.k_teacher, empty, 1.0)
    student = Layer(inputs.q, inputs.k, empty, 1.0)
    layers = Layer(inputs.q[None], inputs.k[None], empty[None], 1.0)
    value, statistic = cuda_impl.statistics(layers, teacher, None, "jsd", 0.5, inputs.geometry())
    assert value.shape == (1, 0) and statistic.shape == (1, 2, 0)
    alignment = Alignment(teacher, torch.empty(0), statistic[0], "jsd", 0.5)
    dq, dk, dv = cuda_impl.backward(student, inputs.geometry(), None, alignment)
    assert dq.shape == (0, 2, 128) and dk.shape == (0, 1, 128) and dv is None
    assert not emulator.launches


@needs_emulation
@pytest.mark.parametrize("tile", build.tiles(), ids=lambda tile: f"{tile.name}{tile.head}")
def test_host_and_device_agree_on_sizes(tile):
    library = emulation.library(Unit("Bfloat16", tile, "NO_DIVERGENCE"))
    assert library.threads() == tile.threads
    for tensors in (2, 3):
        assert library.shared_bytes(tensors) == tile.shared_bytes(tensors)
    for name in ("Statistics", "Prepare", "Backward"):
        size = ctypes.sizeof(getattr(params, name))
        assert library.size_of(name.lower().encode()) == size


@needs_emulation
def test_positions_are_exact():
    """Beyond 2^24, where float32 is not."""
    library = emulation.library(Unit("Bfloat16", build.tiles()[0], "NO_DIVERGENCE"))
    first, unbounded = 1 << 24, cuda_impl.UNBOUNDED
    assert library.last_streamed(first, first + 3, unbounded, 0) == first + 3
    assert library.last_streamed(first, first + 1001, unbounded, 0) == first + 128
    assert library.last_streamed(first, first + 1001, unbounded, unbounded) == first + 1001


@needs_emulation
@pytest.mark.parametrize("tile", build.tiles(), ids=lambda tile: f"{tile.name}{tile.head}")
def test_no_two_lanes_of_a_phase_meet_in_a_bank(tile):
    library = emulation.library(Unit("Bfloat16", tile, "NO_DIVERGENCE"))
    for operand in (b"left", b"right", b"transposed"):
        offsets = [library.lane_offset(operand, lane) for lane in range(32)]
        for phase in range(4):
            assert len({offset // 16 % 8 for offset in offsets[8 * phase :][:8]}) == 8
    chunks = [library.offset_of(row, c) for row in range(tile.own) for c in range(tile.head // 8)]
    assert sorted(chunks) == list(range(0, tile.own * tile.head * 2, 16))  # each place once


# File, its text, what the mutant has instead, and a part of the error.
MUTANTS = {
    "no barrier": ("attention_backward.h", "    engine.arrived();\n    barrier();\n", "",
                   "before thread"),
    "no wait": ("attention_statistics.h",
                "    copy_async_wait_all();\n    engine.arrived();\n    barrier();\n    const",
                "    barrier();\n    const", "before thread"),
    "swizzle": ("attention_blocks.h", "to + tile_offset<ROWS>(row, chunk)",
                "to + (row * TILE::HEAD / CHUNK + chunk) * 16", "relative error"),
    "causal edge": ("attention_blocks.h", "ahead <= right", "ahead < right", "relative error"),
    "lane": ("layout.h", "left_chunk(int lane) { return lane >> 4; }",
             "left_chunk(int lane) { return lane >> 3 & 1; }", "relative error"),
    "key head": ("attention_backward.h", "KEYS ? block.own_head * block.group",
                 "KEYS ? block.own_head", "relative error"),
    "sequence": ("attention_blocks.h", "place.begin = layout.cu_seqlens[low]",
                 "place.begin = layout.cu_seqlens[0]", "^$"),
    "last row": ("attention_gradients.h", "if (row >= rows)", "if (row + 1 >= rows)", "error"),
    "dead tile": ("attention_blocks.h", "live(token + row)", "live(token)", "relative error"),
}  # fmt: skip
WARPGROUP_MUTANTS = {
    "fence": ("sm90_engine.h", "{ fence_for_warpgroups(); }", "{}", "without a fence"),
    "descriptor": ("sm90_engine.h", "describe(streamed + s * 16 * ROW_BYTES, STREAMED_HALF)",
                   "describe(streamed + s * 16 * ROW_BYTES)", "relative error"),
    "products without a fence": ("sm90_engine.h", "    warpgroup_begin();\n", "",
                                 "a wgmma without a fence"),
    "products without a wait": ("sm90_engine.h", "    warpgroup_end();\n", "",
                                "a thread ends before its products"),
}  # fmt: skip
SPECIALIZED_MUTANTS = {
    "stage not waited for": ("attention_ring.h", "    barrier_wait(full(), parity);\n", "",
                             "reads shared memory|may still read"),
    "own tile not waited for": ("attention_backward.h", "    barrier_wait(ring.own_full(), 0);\n",
                                "", "before the copy of barrier|that the copy of barrier"),
    "stage not empty": ("attention_ring.h", "    barrier_wait(empty(), parity ^ 1);\n", "",
                        "may still read|has not handed over|more often|nothing can go on"),
    "a lane misses a phase": (
        "attention_ring.h",
        "would take it for one that has not ended.\n    warp_barrier();\n",
        "would take it for one that has not ended.\n",
        "nothing can go on"),
    "stage given back early": (
        "attention_backward.h",
        "    gradients.add(p, place, Engine<ELEMENT, TILE>(fresh_thread_index()), note.first",
        "    const unsigned empty = ring.empty();\n"
        "    if (thread_index() % WARP == 0) barrier_arrive(empty);\n"
        "    gradients.add(p, place, Engine<ELEMENT, TILE>(fresh_thread_index()), note.first",
        "may still read|before the copy|more often"),
    "stage given back by one lane for all": ("attention_ring.h",
        "    warp_barrier();  // the other lanes are done with the row values, too\n", "",
        "may still read"),
    "stage kept": ("attention_ring.h", "barrier_arrive(empty());", "barrier_arrive(full());",
                   "more often|nothing can go on"),
    "arrivals": ("attention_ring.h", "i * 8, TILE::WARPS)", "i * 8, TILE::WARPS / 2)",
                 "may still read|more often"),
    "row values not awaited": ("attention_ring.h", "1 + (WITH_VALUES ? WARP : 0)", "1",
                               "more often|before thread"),
    "parity": ("attention_ring.h", "stage = 0, parity ^= 1", "stage = 0",
               "may still read|before|more often|nothing can go on"),
    "too few bytes": ("attention_backward.h", "barrier_expect(full, Memory::OWN)",
                      "barrier_expect(full, Memory::OWN - 16)", "more bytes arrive"),
    "too many bytes": ("attention_backward.h", "(1 + PLAIN + teacher)", "(2 + PLAIN + teacher)",
                       "nothing can go on: warp 0 for the barrier"),
    "half": ("attention_ring.h", "half * 64, head", "0, head", "relative error"),
    "second box": ("attention_ring.h", "token + row, full", "token, full", "relative error"),
    "creation not fenced": ("attention_ring.h", "      fence_created_barriers();\n", "",
                            "was not fenced"),
    "creation not known": ("attention_ring.h", "    barrier();\n", "",
                           "there is no barrier|before its creation"),
    "cleared without a fence": ("attention_ring.h", "  fence_for_warpgroups();\n", "",
                                "wrote without a fence|may overtake"),
    "cleared without a barrier": ("attention_ring.h", "  barrier_of(TILE::OWNERS);\n", "",
                                  "before thread"),
    "cut tile not cleared": ("attention_backward.h", "const bool cut = rows < STREAMED",
                             "const bool cut = false", "a NaN left"),
    "own tile not cleared": ("attention_backward.h", "clear_rows<TILE, OWN>(ring.own, live)",
                             "(void)live", "a dropped row"),
    "dropped rows not cleared": ("attention_backward.h", "!= ~0u", "== 1", "a dropped row"),
    "registers": ("attention_backward.h", "    fewer_registers<PRODUCER_REGISTERS>();\n", "",
                  "more registers than a block has"),
}  # fmt: skip
CASE_OF = {
    **dict.fromkeys(MUTANTS, CASES[0]),
    **dict.fromkeys(WARPGROUP_MUTANTS, CASES[5]),
    **dict.fromkeys(SPECIALIZED_MUTANTS, CASES[7]),
}


@needs_emulation
@pytest.mark.slow
@pytest.mark.parametrize("mutant", CASE_OF)
def test_the_emulation_sees_a_mistake(mutant, tmp_path, monkeypatch):
    file, old, new, message = (MUTANTS | WARPGROUP_MUTANTS | SPECIALIZED_MUTANTS)[mutant]
    folder = tmp_path / "csrc"
    shutil.copytree(build.source_folder(), folder)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setattr(emulation, "library", emulation.library.__wrapped__)
    case = replace(CASE_OF[mutant], heads=(4, 2, 2), lengths=(70, 140))
    emulator = emulate(monkeypatch, *case.gpu)
    with pytest.raises(AssertionError, match=message):
        for emulator.order in (0, 1):
            check_case(case, "cpu")
            check_nan_stays(case, "cpu")
            check_dropped_rows(case, "align", "cpu")
            check_dropped_rows(case, "fused", "cpu")


# What only a GPU shows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_250_reruns_are_equal(case, monkeypatch):
    set_up("cuda", monkeypatch, *case.gpu)
    inputs = Inputs(replace(case, lengths=(1000, 129, 871)), "cuda")
    answers = inputs.answers()
    first: list[Tensor] = []
    for run in range(250):
        value, statistic = inputs.statistics(answers, inputs.weight != 0)
        results = [value, statistic]
        for kind in ("align", "plain", "fused"):
            results += inputs.backward(answers, kind, statistic)
        first = first or results
        for i, (x, y) in enumerate(zip(first, results, strict=True)):
            assert torch.equal(x, y), f"run {run}, result {i}"

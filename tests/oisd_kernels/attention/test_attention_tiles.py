"""The tables of tiles: every token in one, and one for every head dimension that is let through."""

import pytest
import torch

from tests.oisd_kernels.attention.test_attention_interpreter import FORMS, geometry

pytest.importorskip("triton")

from oisd_kernels.attention.tiles import Tiles, Work, kept_before, launch_tile, widest

SUFFIXES = ("", " align", " alone")
STATISTICS = ("statistics", "statistics of several", "sampled", "sampled dk")
KERNELS = ("forward", *STATISTICS, *(f"{x}{y}" for x in ("dq", "dkdv") for y in SUFFIXES))


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("known", [False, True], ids=["packed", "dense"])
def test_tiles_cover_every_token_once(block, known):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 40, (6,), generator=generator).tolist()
        if known:
            lengths = [13] * 4
        where = geometry(lengths)._replace(max_length=13 if known else None)
        N = sum(lengths)
        tiles = Tiles.of(where, N, block)
        covered = torch.zeros(N, dtype=torch.int64)
        needed = 0
        for begin, end, start in tiles.table.T.tolist():
            if start < end:
                assert (start - begin) % block == 0
                covered[start : min(start + block, end)] += 1
                needed += 1
        assert (covered == 1).all()
        assert needed == sum(-(-x // block) for x in lengths) <= tiles.programs
        assert tiles.programs <= N // block + len(lengths)
        assert not known or tiles.programs == needed


def test_the_list_of_blocks_with_work():
    where, block = geometry([7, 0, 1, 9]), 4
    weight = torch.zeros(17)
    weight[5] = weight[8] = weight[16] = -1
    keys = Tiles.of(where, 17, 8)
    work = Work.of(where, keys, kept_before(weight), block)
    count = int(work.rank[-1])
    # Blocks start at 0, 4 | 7 | 8, 12, 16.
    assert work.live[:count].tolist() == [4, 8, 16]
    assert work.rank.tolist()[:7] == [0, 0, 1, 1, 2, 2, 3]
    assert work.first[: keys.programs].tolist()[:4] == [0, 2, 3, 3]
    assert work.kept.tolist() == [0] * 6 + [1] * 3 + [2] * 8 + [3]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_is_a_tile_up_to_the_widest_head(capability, dtype):
    for form in FORMS:
        where = geometry([4], form.values[0])
        limit = widest(capability, dtype, where.softcap)
        assert limit >= 32
        for kernel in KERNELS:
            for width in range(16, limit + 1, 16):
                tile = launch_tile(capability, kernel, dtype, width, where)
                assert min(tile.m, tile.n) >= 16
            with pytest.raises(ValueError, match=f"at most {limit} .*got {limit + 16}; use impl="):
                launch_tile(capability, kernel, dtype, limit + 16, where)


def test_float64_has_no_tile_on_a_gpu():
    with pytest.raises(ValueError, match="at most 0 in torch.float64 on sm_90"):
        launch_tile(90, "forward", torch.float64, 64, geometry([4]))

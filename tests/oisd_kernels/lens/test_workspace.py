"""What a CPU thread keeps of its workspace between calls, and how rows are divided into chunks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from oisd_kernels import logit_lens_divergence
from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.chunked.workspace import KEPT_BYTES, logits_buffer, release

CPU = torch.device("cpu")


def place(rows, columns=64, dtype=torch.float32):
    buffer = logits_buffer(rows, columns, dtype, CPU)
    assert buffer.shape == (rows, columns) and buffer.dtype == dtype and buffer.is_contiguous()
    return buffer.data_ptr()


def test_memory_is_kept_for_calls_that_fit():
    release()
    first = place(1000)
    assert place(1000) == place(10) == place(500, dtype=torch.float64) == first
    held = logits_buffer(10, 64, torch.float32, CPU)
    larger = logits_buffer(1001, 64, torch.float32, CPU)
    assert larger.data_ptr() != held.data_ptr() and place(1001) == larger.data_ptr()
    release()
    third = logits_buffer(10, 64, torch.float32, CPU)
    assert third.untyped_storage().nbytes() == 10 * 64 * 4


def test_more_than_the_default_workspace_is_not_kept():
    release()
    kept = place(10)
    large = logits_buffer(KEPT_BYTES // 4 + 1, 1, torch.float32, CPU)
    assert large.untyped_storage().nbytes() == KEPT_BYTES + 4
    assert place(10) == kept


def test_each_thread_has_its_own():
    release()
    mine = logits_buffer(10, 64, torch.float32, CPU).fill_(1.0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: logits_buffer(10, 64, torch.float32, CPU).fill_(2.0)).result()
    assert mine.eq(1.0).all()


def test_kept_memory_is_poisoned_where_torch_poisons_new_memory():
    release()
    logits_buffer(10, 64, torch.float32, CPU).fill_(1.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert logits_buffer(5, 64, torch.float32, CPU).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not logits_buffer(5, 64, torch.float32, CPU).fill_(1.0).isnan().any()


def test_results_are_not_in_the_kept_memory():
    torch.manual_seed(0)
    weight = torch.randn(300, 16)
    results = []
    for _ in range(2):
        hidden = torch.randn(2, 20, 16, requires_grad=True)
        loss = logit_lens_divergence(hidden, torch.randn(20, 16), weight)
        loss.sum().backward()
        results += [loss.detach(), hidden.grad]
    before = [result.clone() for result in results]
    logits_buffer(60, 320, torch.float32, CPU).fill_(torch.nan)
    for result, copy in zip(results, before, strict=True):
        assert copy.isfinite().all() and copy.norm() > 0
        torch.testing.assert_close(result, copy, rtol=0, atol=0)


@pytest.mark.parametrize(("layers", "tokens", "capacity"), [(1, 512, 736), (4, 100, 33), (2, 7, 1)])
def test_chunks_are_as_few_as_fit_and_even(layers, tokens, capacity):
    found = chunks.plan(layers, tokens, None, False, capacity, CPU).chunks
    sizes = [
        chunk.tokens.stop - chunk.tokens.start + chunk.rows.stop - chunk.rows.start
        for chunk in found
    ]
    rows = layers + 1
    assert sum(sizes) == tokens * rows
    assert len(found) == -(-tokens // max(capacity // rows, 1))
    assert max(sizes) <= max(capacity, rows)
    # Within a token's rows of the mean, of which the last may fall short once for each chunk.
    assert max(sizes) < sum(sizes) / len(sizes) + rows
    assert found[0].tokens.start == 0 and found[-1].tokens.stop == tokens


def test_chunks_of_tokens_with_different_numbers_of_rows_stay_within_the_capacity():
    torch.manual_seed(0)
    factor = torch.randint(0, 2, (3, 200)).float()
    greedy = 0
    used = 41
    for kept in (factor != 0).sum(0).tolist():  # tokens are kept without student rows, too
        used += kept + 1
        if used > 40:
            greedy, used = greedy + 1, kept + 1
    found = chunks.plan(3, 200, factor, True, 40, CPU).chunks
    sizes = [c.tokens.stop - c.tokens.start + c.rows.stop - c.rows.start for c in found]
    assert len(found) <= greedy and max(sizes) <= 40
    assert sum(sizes) == 200 + int(factor.sum())


def test_indices_are_on_the_device_of_the_rows():
    """The row kernels are handed them; the lists of chunks need no device."""
    device = torch.device("meta")
    found = chunks.plan(2, 50, None, False, 20, device)
    indices = found.layer_of_row, found.token_of_row, found.slot_of_row
    assert [index.device.type for index in indices] == ["meta"] * 3
    assert len(found.chunks) > 1

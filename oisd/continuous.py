"""Completions by transformers' continuous batching: a finished one leaves its place to the next.

`generate` runs a batch until its longest completion ends, over padding; here each forward holds the
tokens that are due, of however many completions fit, over a paged key-value cache in which
completions of one prompt share its blocks. The same sampler draws from the same noise.

transformers' manager runs its loop in a thread that it starts, and takes requests while it runs:
what is batched with what then depends on timing, and in the last digits so do the logits. Here all
requests wait before its loop is run, in the caller's own thread: a run repeats to the bit, and
autocast, which belongs to a thread, is in force. Left out for the same reason: CUDA graphs and
asynchronous batches, which would run ahead of the sampler, and on a GPU have not been tried.

Attention is transformers' own for a paged cache, of the kind that the model has: FlashAttention, or
SDPA and eager attention with a mask over everything that is in flight, whose work grows with the
square of it. `rollout.engine = "auto"` measures whether that pays.

Shape letters: B completions, T completion tokens, N query tokens of one forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
)

from oisd.sampling import TokenSampler

# Query tokens of a forward: that many prompts' tokens are read at once.
_PREFILL = 512
# FlashAttention's decoding kernel reads blocks of 256; short ones waste less and share more.
_FLASH_BLOCK, _BLOCK = 256, 32
_SHARE_OF_MEMORY = 0.7


def why_not(model: Any, longest: int) -> str | None:
    """Why this model cannot be run by continuous batching here; None if it can.

    longest: tokens of the longest prompt and its completion.
    """
    config = model.config
    if getattr(config, "attn_logit_softcapping", None):
        return "its paged attention leaves out the softcap of the attention scores"
    unknown = _kinds(config) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"it has no paged cache for layers of {', '.join(sorted(unknown))}"
    # Once the window is full, transformers up to 5.10 reads its rolling cache one token askew.
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in _kinds(config) and longest > window:
        return f"its window of {window} tokens is shorter than {longest}, prompt and completion"
    if getattr(model, "_is_stateful", False) or config.is_encoder_decoder:
        return "its layers keep another state than keys and values"
    if model.device.type == "cpu":
        try:
            import psutil  # noqa: F401
        except ImportError:
            return "on a CPU it needs psutil, to know how much memory there is"
    return None


def _kinds(config: Any) -> set[str]:
    """Kinds of attention of the layers, as the paged cache reads the configuration."""
    window = getattr(config, "sliding_window", None)
    everywhere = "full_attention" if window is None else "sliding_attention"
    return {*(getattr(config, "layer_types", None) or [everywhere])}


def run(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    sampler: TokenSampler,
    settings: GenerationConfig,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Token ids and log-probs, right-padded to [B, max_new_tokens].

    model: in evaluation mode; under autocast the cache is in autocast's dtype.
    prompts: B lists of token ids, not empty.
    keys: [B] int64, from `row_keys`.
    batch_size: the cache holds so many completions at full length; more of them while they are
        short, fewer where a GPU has no memory for it.

    Raises ValueError for a model that it cannot run, RuntimeError where the loop failed.
    """
    limit = settings.max_new_tokens
    assert isinstance(limit, int)
    longest = max(len(prompt) for prompt in prompts) + limit
    reason = why_not(model, longest)
    if reason is not None:
        raise ValueError(
            f'sample: engine must be "generate" for {type(model).__name__}, got "continuous": '
            f"{reason}"
        )
    with _paged_attention(model) as implementation:
        served = _Served(model)
        block = _FLASH_BLOCK if "flash" in implementation else _BLOCK
        blocks = min(batch_size, len(prompts)) * (longest // block + 2)
        manager = ContinuousBatchingManager(
            model=served,  # pyright: ignore[reportArgumentType]
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(
                block_size=block,
                num_blocks=_that_fit(served, blocks, block),
                max_batch_tokens=max(batch_size, _PREFILL),
                use_cuda_graph=False,
                use_async_batching=False,
                seed=0,
            ),
        )
        processors = _NoisyProcessors(sampler, keys, limit)
        manager.logit_processor = processors
        for slot, prompt in enumerate(prompts):
            manager.add_request(
                list(prompt), request_id=str(slot), slot=slot, prompt_length=len(prompt)
            )
        manager.background_thread_status.request_stop(BackgroundThreadStatus.FLUSH_AND_STOP, 0)
        # The manager seeds torch's own generator.
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                manager._run_generation_loop()
        finally:
            manager.batch_processor = None  # and with it the cache
            manager.destroy()
    if manager.fatal_error is not None:
        raise RuntimeError(
            f"sample: continuous batching failed ({manager.fatal_error}); a smaller batch_size "
            f'needs less memory, engine "generate" does without'
        ) from manager.fatal_error
    ids = torch.full((len(prompts), limit), int(settings.pad_token_id))  # pyright: ignore
    results = manager.output_router.output_queue
    while not results.empty():
        result = results.get()
        if result.error is not None:
            raise RuntimeError(f"sample: continuous batching failed: {result.error}")
        tokens = torch.tensor(result.generated_tokens)
        ids[int(result.request_id), : len(tokens)] = tokens
    return ids.to(keys.device), processors.logprobs[:-1, :limit]


class _NoisyProcessors(ContinuousBatchingLogitsProcessorList):
    """A manager's logits processors: one that samples by itself, as `generate`'s does.

    It leaves the sampled token alone possible and keeps its log-prob on the device.
    """

    def __init__(self, sampler: TokenSampler, keys: Tensor, limit: int) -> None:
        super().__init__(LogitsProcessorList())  # pyright: ignore[reportCallIssue]
        self.do_processing = True
        self.tensors_required = 2
        self.supported_keys = {"slot": int, "prompt_length": int}
        self.sampler, self.keys = sampler, keys
        # A last row takes what no completion needs.
        self.logprobs = torch.zeros(len(keys) + 1, limit + 1, device=keys.device)
        self.due: list[int] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Which query tokens [N] are the last of their request, whose, and of how many tokens."""
        ends, slots, positions, end = [], [], [], 0
        for request in requests_in_batch:
            end += request.query_length
            if request.has_new_token:
                given = request.state.logit_processor_kwargs
                ends.append(end - 1)
                slots.append(given["slot"])
                # Not the length of what it generated: a request that was evicted begins anew
                # with that in its prompt.
                positions.append(request.state.position_offset - given["prompt_length"])
        self.due = ends
        kinds = torch.tensor([slots, positions], dtype=torch.int32)
        arg_storage[:, : len(slots)] = kinds.to(arg_storage.device)
        return arg_storage

    def __call__(self, input_ids: Any, scores: Any, logits_processor_args: Tensor) -> Any:
        """scores [N, V], of which only the rows that are due matter."""
        due = torch.tensor(self.due, dtype=torch.int64, device=scores.device)
        slots, positions = logits_processor_args[:, : len(self.due)].long()
        tokens, logprobs = self.sampler(scores[due], self.keys[slots], positions)
        self.logprobs[slots, positions] = logprobs
        return torch.full_like(scores, -torch.inf).index_put_((due, tokens), scores.new_zeros(()))


class _Served(nn.Module):
    """The model as the manager sees it: in the dtype of the forward, with nothing of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config, self.device = model.config, model.device
        kind = model.device.type
        autocast = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if autocast else model.dtype

    def forward(self, cache: Any, **arguments: Any) -> Any:
        return self.model(cache=_OneDtype(cache, self.dtype), **arguments)

    def _get_logits_processor(self, generation_config: GenerationConfig) -> LogitsProcessorList:
        return LogitsProcessorList()


class _OneDtype:
    """A paged cache that takes what autocast makes of keys (float32, rotated) and values (not)."""

    def __init__(self, cache: Any, dtype: torch.dtype) -> None:
        self._cache, self._dtype = cache, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key_states: Tensor, value_states: Tensor, **where: Any) -> Any:
        keys, values = key_states.to(self._dtype), value_states.to(self._dtype)
        return self._cache.update(key_states=keys, value_states=values, **where)


@contextmanager
def _paged_attention(model: Any) -> Iterator[str]:
    """The paged kind of the attention that the model has."""
    own = model.config._attn_implementation
    # Ours computes no attention over a cache, and asks SDPA for it.
    paged = "paged|sdpa" if own == "oisd" else f"paged|{own}"
    model.set_attn_implementation(paged)
    try:
        yield paged
    finally:
        model.set_attn_implementation(own)


def _that_fit(served: _Served, blocks: int, block: int) -> int:
    """At most `blocks`, and of a GPU's free memory a part, the logits taking theirs."""
    if served.device.type != "cuda":
        return blocks
    config = served.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * served.dtype.itemsize * block
    free = torch.cuda.mem_get_info(served.device)[0]
    free += torch.cuda.memory_reserved(served.device) - torch.cuda.memory_allocated(served.device)
    return max(1, min(blocks, int(_SHARE_OF_MEMORY * free) // size))

"""Completions by transformers' continuous batching: a finished one frees its place for the next.

`generate` runs a batch until its longest completion ends, over padding. Here each forward holds the
tokens that are due, of as many completions as fit, over a paged key-value cache in which
completions of one prompt share its blocks. The same sampler draws from the same noise.

transformers' manager runs its loop in a thread of its own and takes requests while it runs. The
batches then depend on timing, and with them the last digits of the logits. Here all requests are
queued before the loop is run, in the caller's own thread: a run repeats to the bit, and autocast,
which belongs to a thread, is in force. Left out are CUDA graphs and asynchronous batches, which
would run ahead of the sampler.

The loop is internal to transformers and changes between its versions. `TESTED` is the range that is
supported here; other versions are refused, and differences are looked up where they matter.

Attention is transformers' own for a paged cache, of the model's kind: FlashAttention, or SDPA and
eager attention with a mask over all tokens in flight, whose work grows with their square.
`rollout.engine = "auto"` measures whether that is worth it.

Shape letters: B completions, T completion tokens, N query tokens of one forward, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oisd.rollout.sampling import TokenSampler

# First and last version of transformers. Both pass tests/oisd/rollout/test_continuous.py, and so
# does 5.17; one release of each minor version in between sampled the tokens of `generate`.
TESTED = (5, 10), (5, 24)
# Before this version, a rolling cache whose window is full is read one token off.
FULL_WINDOWS = (5, 16)
# Query tokens of a forward: as many tokens of prompts are read at once.
_PREFILL = 512
# FlashAttention's decoding kernel reads blocks of 256; short ones waste less and share more.
_FLASH_BLOCK, _BLOCK = 256, 32
_SHARE_OF_MEMORY = 0.7


def why_not(model: Any, longest: int) -> str | None:
    """Why this model cannot be run by continuous batching here; None if it can.

    longest: tokens of the longest prompt and its completion.
    """
    reason = untested()
    if reason is not None:
        return reason
    config = model.config
    if getattr(config, "attn_logit_softcapping", None):
        return "its paged attention leaves out the softcap of the attention scores"
    unknown = _kinds(config) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"it has no paged cache for layers of {', '.join(sorted(unknown))}"
    window = getattr(config, "sliding_window", None)
    full = window is not None and longest > window and "sliding_attention" in _kinds(config)
    if full and version() < FULL_WINDOWS:
        return (
            f"its window of {window} tokens is shorter than {longest}, prompt and completion, "
            f"which transformers samples wrongly before {_name(FULL_WINDOWS)}"
        )
    if getattr(model, "_is_stateful", False) or config.is_encoder_decoder:
        return "its layers keep another state than keys and values"
    if model.device.type == "cpu":
        try:
            import psutil  # noqa: F401
        except ImportError:
            return "on a CPU it needs psutil, to know how much memory there is"
    return None


def version() -> tuple[int, ...]:
    """Major and minor version of transformers."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def untested() -> str | None:
    """Why this version of transformers is refused; None if it is one of the tested ones."""
    if TESTED[0] <= version() <= TESTED[1]:
        return None
    return (
        f"transformers {transformers.__version__} may have changed its continuous batching, which "
        f"is tested with {_name(TESTED[0])} to {_name(TESTED[1])}"
    )


def _name(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


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
    batch_size: completions at full length for which the cache has room; more fit while they are
        short, fewer if a GPU lacks the memory.

    Raises ValueError for a model that it cannot run, RuntimeError if the loop failed.
    """
    longest = max(len(prompt) for prompt in prompts) + int(settings.max_new_tokens or 0)
    reason = why_not(model, longest)
    if reason is not None:
        raise ValueError(
            f'sample: engine must be "generate" for {type(model).__name__}, got "continuous": '
            f"{reason}"
        )
    limit: Any = settings.max_new_tokens
    with _naming_version():
        # Not at the top: versions before 5.10 have other names, and `why_not` must refuse them.
        from transformers.generation.continuous_batching import ContinuousBatchingManager

        with _paged_attention(model) as implementation:
            due = _Due()
            served = _Served(model, due, sampler, keys, limit)
            block = _FLASH_BLOCK if "flash" in implementation else _BLOCK
            blocks = _that_fit(
                served, min(batch_size, len(prompts)) * (longest // block + 2), block
            )
            manager: Any = ContinuousBatchingManager(
                model=served,  # pyright: ignore[reportArgumentType]
                generation_config=settings,
                continuous_batching_config=_config(block, blocks, max(batch_size, _PREFILL)),
            )
            manager.logit_processor = due
            for slot, prompt in enumerate(prompts):
                manager.add_request(
                    list(prompt), request_id=str(slot), slot=slot, prompt_length=len(prompt)
                )
            _run_loop(manager, model.device)
        _raise_failure(manager)
    ids = torch.full((len(prompts), limit), int(settings.pad_token_id))  # pyright: ignore
    results = manager.output_router.output_queue
    while not results.empty():
        result = results.get()
        if result.error is not None:
            raise RuntimeError(f"sample: continuous batching failed: {result.error}")
        tokens = torch.tensor(result.generated_tokens)
        ids[int(result.request_id), : len(tokens)] = tokens
    return ids.to(keys.device), served.logprobs[:-1, :limit]


@contextmanager
def _naming_version() -> Iterator[None]:
    """Turns the error of an interface that has changed into one that names the version."""
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        raise RuntimeError(
            f"sample: continuous batching of transformers {transformers.__version__} failed "
            f"({type(error).__name__}: {error}; tested with {_name(TESTED[0])} to "
            f'{_name(TESTED[1])}); use engine "generate"'
        ) from error


def _run_loop(manager: Any, device: torch.device) -> None:
    """Serves all requests in this thread."""
    status = manager.background_thread_status
    status.request_stop(status.FLUSH_AND_STOP, 0)
    loop = manager._run_generation_loop
    # Autocast would cache the weights as inference tensors, which training cannot use.
    mode = {"use_inference_mode": False} if inspect.signature(loop).parameters else {}
    # The manager seeds torch's own generator and makes the model's device the current one.
    devices = [device] if device.type == "cuda" else []
    on_device = torch.cuda.device(device) if devices else nullcontext()
    try:
        with torch.random.fork_rng(devices=devices), on_device, torch.no_grad():
            loop(**mode)
    finally:
        manager.batch_processor = None  # and with it the cache
        manager.destroy()


def _config(block: int, blocks: int, tokens: int) -> Any:
    """How it batches: `blocks` of `block` tokens of cache, forwards of at most `tokens` tokens."""
    from transformers import ContinuousBatchingConfig

    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    wanted = {
        "page_size" if "page_size" in known else "block_size": block,
        "num_blocks": blocks,
        "max_batch_tokens": tokens,
        "use_cuda_graph": False,
        "use_async_batching": False,
        "seed": 0,
    }
    # Only in later versions.
    later = {"max_requests_per_batch": tokens, "auto_switch_to_flash": False}
    later = {name: value for name, value in later.items() if name in known}
    return ContinuousBatchingConfig(**wanted, **later)


def _raise_failure(manager: Any) -> None:
    """Raises the error that ended the loop, if there was one."""
    holder = manager if hasattr(manager, "fatal_error") else manager.background_thread_status
    error = holder.fatal_error
    if isinstance(error, (AttributeError, ImportError, TypeError)):
        raise error
    if error is not None:
        raise RuntimeError(
            f"sample: continuous batching failed ({error}); a smaller batch_size needs less "
            f'memory, or use engine "generate"'
        ) from error


class _Due:
    """Replaces a manager's logits processors; it processes nothing, but records what is due."""

    do_processing = False
    tensors_required = 0

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.positions: list[int] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None: ...

    def fill_defaults(self, int32_tensor: Tensor) -> None: ...

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Records whose next token the coming forward computes, and how many each has."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        given = [state.logit_processor_kwargs for state in states]
        self.slots = [one["slot"] for one in given]
        # Not the number of tokens generated: an evicted request restarts with those in its prompt.
        self.positions = [
            state.position_offset - one["prompt_length"]
            for state, one in zip(states, given, strict=True)
        ]
        return arg_storage


class _Served(nn.Module):
    """The model as the manager sees it: in the dtype of the forward, with the tokens sampled.

    Its logits allow the sampled token alone. `logprobs` [B + 1, T + 1] are those of the samples.
    """

    def __init__(
        self, model: Any, due: _Due, sampler: TokenSampler, keys: Tensor, limit: int
    ) -> None:
        super().__init__()
        self.model = model
        self.due, self.sampler, self.keys = due, sampler, keys
        # The last row and column are for tokens that no completion needs.
        self.logprobs = torch.zeros(len(keys) + 1, limit + 1, device=keys.device)
        kind = model.device.type
        autocast = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if autocast else model.dtype

    def __getattr__(self, name: str) -> Any:
        """Anything else that a version asks of a model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, cache: Any, **arguments: Any) -> Any:
        kind = _of_one_dtype(type(cache))
        if type(cache) is not kind:
            cache.__class__ = kind
        logits = self.model(cache=cache, **arguments).logits[0]
        count, device = len(self.due.slots), logits.device
        # The first indices are those of the tokens that are due. Some versions ask the model for
        # these logits alone, in this order; the others pick them from all that it returns.
        due = arguments["logits_indices"][:count].long()
        if "logits_to_keep" in arguments:
            due = torch.arange(count, device=device)
        slots, positions = torch.tensor(
            [self.due.slots, self.due.positions], dtype=torch.int64, device=device
        )
        tokens, logprobs = self.sampler(logits[due], self.keys[slots], positions)
        self.logprobs[slots, positions] = logprobs
        chosen = torch.full_like(logits, -torch.inf)
        chosen.index_put_((due, tokens), chosen.new_zeros(()))
        return SimpleNamespace(logits=chosen[None])

    def _get_logits_processor(self, generation_config: GenerationConfig) -> LogitsProcessorList:
        return LogitsProcessorList()


@functools.cache
def _of_one_dtype(kind: Any) -> Any:
    """The kind of cache that casts keys and values to its dtype: autocast gives float32 keys."""
    if hasattr(kind, "of_one_dtype"):
        return kind

    class OneDtype(kind):
        of_one_dtype = True

        def update(self, key_states: Tensor, value_states: Tensor, *where: Any, **named: Any):
            keys, values = key_states.to(self.dtype), value_states.to(self.dtype)
            return super().update(keys, values, *where, **named)

    return OneDtype


@contextmanager
def _paged_attention(model: Any) -> Iterator[str]:
    """Switches the model to the paged kind of its attention."""
    own = model.config._attn_implementation
    # Ours computes no attention over a cache; SDPA does it instead.
    paged = "sdpa" if own == "oisd" else own
    # In later versions only eager attention has another name for a paged cache.
    if paged == "eager" or "paged|sdpa" in ALL_ATTENTION_FUNCTIONS:
        paged = f"paged|{paged}"
    model.set_attn_implementation(paged)
    try:
        yield paged
    finally:
        model.set_attn_implementation(own)


def _that_fit(served: _Served, blocks: int, block: int) -> int:
    """At most `blocks`, and only a part of a GPU's free memory: the logits need some too."""
    if served.device.type != "cuda":
        return blocks
    config = served.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * served.dtype.itemsize * block
    free = torch.cuda.mem_get_info(served.device)[0]
    free += torch.cuda.memory_reserved(served.device) - torch.cuda.memory_allocated(served.device)
    return max(1, min(blocks, int(_SHARE_OF_MEMORY * free) // size))

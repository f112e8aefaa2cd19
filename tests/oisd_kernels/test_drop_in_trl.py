"""Drop-ins for TRL: against float64, against TRL itself, inside its trainer.

The shapes, dtypes, scales and softcaps are those of TestChunkedDivergenceLoss in TRL 1.16's
tests/test_distillation_trainer.py; the signatures are compared in test_drop_in.py.
"""

import pytest
import torch
from torch import Tensor

from oisd_kernels.drop_in import ChunkedDivergenceFunction, chunked_divergence_loss
from tests.oisd_kernels.test_drop_in import (
    assert_alike,
    assert_meets_the_bounds,
    jsd,
    needs_trl,
    rejects,
    truth,
)
from tests.oisd_kernels.test_reference import (
    GRADIENT_BOUND,
    LOSS_BOUND,
    assert_gradient_close,
    assert_loss_close,
    leaf,
)


def trl_case(B=2, K=6, H=8, V=17, teacher_width=None, masked=3, dtype=torch.float32, spread=1.0):
    """(student states, teacher states, student head, teacher head, mask), from normal numbers."""
    g, E = torch.Generator().manual_seed(0), teacher_width or H

    def normal(*shape, by=1.0):
        return (torch.randn(*shape, generator=g) * by).to(dtype)

    states = leaf(normal(B, K, H)), normal(B, K, E)
    heads = leaf(normal(V, H, by=spread)), normal(V, E, by=spread)
    mask = torch.ones(B, K)
    mask.view(-1)[torch.randperm(B * K, generator=g)[:masked]] = 0
    return *states, *heads, mask


TRL_OPTIONS = {
    "plain": {},
    "temperature0.7": {"temperature": 0.7},
    "temperature2": {"temperature": 2.0},
    "scale-softcap": {"student_logit_scale": 0.5, "student_final_logit_softcapping": 3.0},
    "temperature-softcap": {"temperature": 2.0, "student_final_logit_softcapping": 3.0},
    "both-scaled-and-capped": {
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
        "student_final_logit_softcapping": 50.0,
        "teacher_final_logit_softcapping": 30.0,
    },
    "teacher-alone": {"teacher_logit_scale": 1.3, "teacher_final_logit_softcapping": 3.0},
}
BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
BIASED = pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])


def trl_biases(vocabulary: int) -> dict:
    return {
        "student_lm_head_bias": leaf(torch.linspace(-1, 1, vocabulary)),
        "teacher_lm_head_bias": torch.linspace(1, -1, vocabulary),
    }


def our_names(options: dict) -> dict:
    """TRL's options under the names of `distillation_divergence`."""
    return {
        name.replace("student_", "").replace("final_logit_softcapping", "logit_softcap"): value
        for name, value in options.items()
    }


def entropy_truth(case, biases, options) -> Tensor:
    hidden, _, weight, _, mask = case
    z = hidden.detach().double() @ weight.detach().double().T
    z = z + biases["student_lm_head_bias"].detach().double() if biases else z
    z, cap = options.get("student_logit_scale", 1.0) * z, our_names(options).get("logit_softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    lp = (z / options.get("temperature", 1.0)).log_softmax(-1)
    return -((lp.exp() * lp).sum(-1) * mask).sum()


@BIASED
@BETAS
@pytest.mark.parametrize("options", TRL_OPTIONS)
def test_trl_loss_meets_the_bounds(options, beta, biased):
    options = TRL_OPTIONS[options]
    hidden, teacher, weight, teacher_weight, mask = case = trl_case(teacher_width=12)
    biases = trl_biases(17) if biased else {}
    student = hidden.flatten(0, 1), weight, biases.get("student_lm_head_bias")
    want = truth(
        student,
        (teacher.flatten(0, 1), teacher_weight, biases.get("teacher_lm_head_bias")),
        leaves=3 if biased else 2,
        token_weight=mask.flatten(),
        reduction="mean",
        **jsd(beta),
        **our_names(options),
    )
    loss, entropy, count = chunked_divergence_loss(*case, beta, **biases, **options)
    loss.backward()
    want[1] = want[1].view_as(hidden)
    leaves = [hidden, weight, *list(biases.values())[:1]]
    assert_meets_the_bounds(loss, leaves, want, torch.float32, floor=1e-3)
    assert count == 9 and not entropy.requires_grad
    assert_loss_close(entropy, entropy_truth(case, biases, options), LOSS_BOUND[torch.float32])
    assert torch.count_nonzero(hidden.grad[mask == 0]) == 0


@needs_trl
@BIASED
@BETAS
@pytest.mark.parametrize("options", TRL_OPTIONS)
@pytest.mark.parametrize("items", [None, 1, 7], ids=["mean", "items1", "items7"])
def test_trl_loss_is_theirs(items, options, beta, biased):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as theirs

    hidden, _, weight, _, _ = case = trl_case(teacher_width=12)
    biases = trl_biases(17) if biased else {}
    leaves = [hidden, weight, *list(biases.values())[:1]]
    results = []
    for function in (theirs, chunked_divergence_loss):
        out = function(*case, beta, num_items_in_batch=items, **biases, **TRL_OPTIONS[options])
        results.append([*out, *torch.autograd.grad(out[0], leaves)])
    assert_alike(*results, bounds=[2e-5] * len(results[0]))


@needs_trl
@pytest.mark.parametrize("autocast", [False, True], ids=["inputs", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_loss_is_theirs_in_half_precision(beta, dtype, autocast):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as theirs

    spread = (10.0 if beta == 0.5 else 30.0) / 64**0.5
    hidden, _, weight, _, _ = case = trl_case(
        H=64, dtype=torch.float32 if autocast else dtype, spread=spread
    )
    biases = trl_biases(17)
    leaves = [hidden, weight, biases["student_lm_head_bias"]]
    results = []
    for function in (theirs, chunked_divergence_loss):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            out = function(*case, beta, **biases)
        results.append([*out, *torch.autograd.grad(out[0], leaves)])
    # Theirs takes the entropy as logsumexp minus a mean, numbers near 100: 1.6e-4 off. The
    # gradients are rounded on both sides.
    assert_alike(*results, bounds=[1e-5, 5e-4, 0, 8e-3, 8e-3, 8e-3])


@needs_trl
@BIASED
@BETAS
def test_trl_function_is_theirs(beta, biased):
    """A divergence per token, with gradients that differ from token to token."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Theirs

    hidden, teacher, weight, teacher_weight, _ = trl_case(teacher_width=12)
    bias, teacher_bias = trl_biases(17).values() if biased else (None, None)
    rows = leaf(hidden.flatten(0, 1)), weight, bias
    leaves = [x for x in rows if x is not None]
    upstream = torch.linspace(-1, 2, 12)
    results = []
    for function in (Theirs, ChunkedDivergenceFunction):
        out = function.apply(
            *rows, teacher.flatten(0, 1), teacher_weight, teacher_bias, beta, 0.7, 0.5, 3.0, 1.3
        )
        assert not out[1].requires_grad
        results.append([*out, *torch.autograd.grad((out[0] * upstream).sum(), leaves)])
    assert_alike(*results, bounds=[2e-5] * len(results[0]))


@needs_trl
def test_trl_trainer_runs_on_ours(tmp_path, monkeypatch):
    """The same three steps of their DistillationTrainer, with one name replaced."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer

    calls = []

    class Counted(ChunkedDivergenceFunction):
        @staticmethod
        def apply(*inputs):
            calls.append(inputs)
            return ChunkedDivergenceFunction.apply(*inputs)

    def train() -> Tensor:
        torch.manual_seed(0)
        teacher, config = arithmetic_model(), DistillationConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4,
            max_completion_length=6, report_to="none", use_cpu=True, bf16=False, logging_steps=1,
            learning_rate=1e-3, save_strategy="no", disable_tqdm=True, beta=0.5,
        )  # fmt: skip
        with torch.no_grad():
            for x in teacher.parameters():
                x.add_(torch.randn_like(x), alpha=0.05)
        trainer = DistillationTrainer(
            model=arithmetic_model(),
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["47+85=", "10+11=", "12+31=", "5+50="]}),
            processing_class=arithmetic_tokenizer(),
        )
        trainer.train()
        log = trainer.state.log_history[:3]
        return torch.tensor([[x["loss"], x["grad_norm"], x["entropy"]] for x in log])

    theirs = train()
    name = "trl.trainer.distillation_trainer.ChunkedDivergenceFunction"
    monkeypatch.setattr(name, Counted)
    ours = train()
    assert len(calls) == 3 and (theirs > 1e-3).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_trl_all_masked_keeps_the_graph():
    hidden, teacher, weight, teacher_weight, mask = trl_case()
    bias = leaf(torch.zeros(17))
    loss, _, count = chunked_divergence_loss(
        hidden, teacher, weight, teacher_weight, torch.zeros_like(mask), 0.5,
        student_lm_head_bias=bias,
    )  # fmt: skip
    loss.backward()
    assert loss == 0 and count == 0
    assert all(torch.count_nonzero(x.grad) == 0 for x in (hidden, weight, bias))


@pytest.mark.parametrize("shared", [False, True], ids=["two-heads", "one-head"])
def test_the_teacher_receives_nothing(shared):
    hidden, teacher, weight, teacher_weight, mask = trl_case()
    teacher, teacher_weight = leaf(teacher), weight if shared else leaf(teacher_weight)
    loss, *_ = chunked_divergence_loss(hidden, teacher, weight, teacher_weight, mask, 0.5)
    loss.backward()
    assert hidden.grad.norm() > 1e-2 and teacher.grad is None
    assert shared or teacher_weight.grad is None
    student = hidden.flatten(0, 1), weight, None
    other = teacher.flatten(0, 1), teacher_weight, None
    want = truth(student, other, token_weight=mask.flatten(), reduction="mean")
    assert_gradient_close(weight.grad, want[2], GRADIENT_BOUND[torch.float32], floor=1e-2)


def test_trl_gathers_a_sharded_head():
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    hidden, teacher, weight, teacher_weight, mask = trl_case()
    whole, *_ = chunked_divergence_loss(hidden, teacher, weight, teacher_weight, mask, 0.5)
    (want,) = torch.autograd.grad(whole, weight)
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = leaf(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
        other = distribute_tensor(teacher_weight, mesh, [Shard(0)])
        loss, *_ = chunked_divergence_loss(hidden, teacher, sharded, other, mask, 0.5)
        loss.backward()
        gradient = sharded.grad.full_tensor()
    finally:
        distributed.destroy_process_group()
    assert want.norm() > 1e-2
    assert torch.equal(loss, whole) and torch.equal(gradient, want)


# Bad input

X = torch.zeros
LOSS = {"student_hidden_states": X(2, 3, 8), "student_lm_head_weight": X(11, 8)}
LOSS |= {"teacher_hidden_states": X(2, 3, 6), "teacher_lm_head_weight": X(11, 6)}
LOSS |= {"completion_mask": X(2, 3), "beta": 0.5}


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("student_hidden_states", None, "NoneType"),
        ("student_hidden_states", X(2, 3, 8, dtype=torch.int64), "torch.int64"),
        ("teacher_hidden_states", X(2, 4, 6), "[2, 4]"),
        ("student_lm_head_weight", X(11, 6), "[11, 6]"),
        ("student_lm_head_weight", X(0), "[0]"),  # as ZeRO-3 leaves a parameter it has sharded
        ("teacher_lm_head_weight", X(12, 6), "[12, 6]"),
        ("completion_mask", X(6), "[6]"),
        ("completion_mask", None, "NoneType"),
        ("student_lm_head_bias", X(8), "[8]"),
        ("teacher_lm_head_bias", X(8), "[8]"),
        ("beta", -1.0, "-1.0"),
        ("temperature", -1.0, "-1.0"),
        ("student_logit_scale", 0.0, "0.0"),
        ("teacher_logit_scale", None, "None"),
        ("student_final_logit_softcapping", 0.0, "0.0"),
        ("teacher_final_logit_softcapping", "30", "'30'"),
    ],
)
def test_trl_rejects(name, value, got):
    rejects(chunked_divergence_loss, {**LOSS, name: value}, name, got)


def test_trl_function_rejects():
    arguments = {"student_hidden": X(2, 3, 8), "student_weight": X(11, 8), "student_bias": None}
    arguments |= {"teacher_hidden": X(6, 6), "teacher_weight": X(11, 6), "teacher_bias": None}
    arguments["beta"] = 0.5
    name = "ChunkedDivergenceFunction"
    rejects(ChunkedDivergenceFunction.apply, arguments, "student_hidden", "[2, 3, 8]", name)


def test_a_number_for_hidden_states_is_refused():
    head, mask = torch.zeros(5, 4), torch.ones(1, 3)
    for given in ((torch.zeros(1, 3, 4), torch.tensor(1.0)), (torch.tensor(1.0),) * 2):
        with pytest.raises(ValueError, match="hidden_states must have at least one dimension"):
            chunked_divergence_loss(*given, head, head, mask, 0.5)

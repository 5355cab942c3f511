"""Distillation against torch's KL in float64 with transformers' models; what a teacher must not change; its recipe."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megasparse import config, topology
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.weights import Source, load_teacher
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch
from megasparse.distillation import Teacher, divergence, teacher_recipe
from megasparse.engine import Engine, StepResult
from megasparse.layout import Layout, check_layout
from megasparse.model import build_model
from tests import oracle, small
from tests.checkpoint.runs import assert_same, state_of
from tests.helpers import assert_close, run_distributed

# The divergence -------------------------------------------------------------------------------------------------------


def plain_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's, of float64."""
    log_q, log_p = (F.log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def logits(seed: int) -> Tensor:
    """[3, 5, 95], peaked."""
    return 4 * torch.randn(3, 5, small.VOCAB - 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergence_and_its_gradient_are_torchs(temperature: float) -> None:
    student, teacher, weights = logits(1).requires_grad_(), logits(2), torch.rand(3, 5)
    expected = plain_divergence(student, teacher, temperature)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), student)
    ours = divergence(student, teacher, temperature)
    (our_gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    assert_close([ours, our_gradient], [expected, gradient], 1e-6)


def of_a_split_vocabulary() -> tuple[Tensor, Tensor]:
    """48 tokens on rank 0, 47 on rank 1: their divergence, and this rank's gradient."""
    topology.initialize(Layout(dp=2))
    columns = slice(0, 48) if dist.get_rank() == 0 else slice(48, None)
    student = logits(1)[..., columns].requires_grad_()
    nats = divergence(student, logits(2)[..., columns], 2.0, dist.group.WORLD)
    nats.sum().backward()
    assert student.grad is not None
    return nats.detach(), student.grad


def test_a_vocabulary_split_over_ranks() -> None:
    student = logits(1).requires_grad_()
    expected = plain_divergence(student, logits(2), 2.0)
    expected.sum().backward()
    parts = run_distributed(of_a_split_vocabulary, 2)
    assert_close([nats for nats, _ in parts], [expected, expected], 1e-6)
    assert_close(torch.cat([gradient for _, gradient in parts], -1), student.grad, 1e-6)


def test_logits_of_low_precision_are_compared_in_float32() -> None:
    student, teacher = logits(1).bfloat16().requires_grad_(), logits(2).bfloat16()
    expected = plain_divergence(student, teacher, 2.0)
    ours = divergence(student, teacher, 2.0)
    assert ours.dtype == torch.float32
    assert_close(ours, expected, 1e-6)
    ours.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


# Steps ----------------------------------------------------------------------------------------------------------------

WIDE = {"num_layers": 3, "hidden_size": 48, "bias": "qkv", "init_std": 0.3}  # a teacher of another size


def with_teacher(recipe: Recipe, **teacher: Any) -> Recipe:
    raw = recipe.model_dump(mode="json")
    raw["training"]["teacher"] = {"checkpoint": "unused", **teacher}
    return parse_recipe(raw)


def teach(recipe: Recipe, own: Recipe, place: topology.Topology, chunks: Any = None) -> Teacher:
    """The teacher that ``own`` draws, or these chunks of it."""
    theirs = teacher_recipe(recipe, own, Path("unused"), place.world_size)
    chunks = build_model(theirs, place, small.VOCAB)[0] if chunks is None else chunks
    assert recipe.training.teacher is not None
    return Teacher(recipe.training.teacher, theirs, place, chunks)


def engine_of(recipe: Recipe, place: topology.Topology, teacher: Teacher | None) -> Engine:
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB), teacher)


def test_steps_equal_transformers_in_float64(single: topology.Topology) -> None:
    """Twelve updates from the sum of both losses over unevenly masked tokens, the teacher of another size."""
    theirs = oracle.llama().double()
    theirs_teacher = oracle.llama(
        hidden_size=48, num_hidden_layers=3, attention_bias=False, initializer_range=0.3
    ).double()
    recipe = with_teacher(small.recipe(parallel={"zero_stage": 0}), temperature=2.0, weight=0.67)
    teacher = teach(recipe, small.recipe({**WIDE, "bias": "none"}), single)
    ours = engine_of(recipe, single, teacher)
    oracle.copy_weights(ours.chunks[0], theirs)  # type: ignore[arg-type]
    oracle.copy_weights(teacher.chunks[0], theirs_teacher)  # type: ignore[arg-type]
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    seen = []
    for step in range(12):
        batches = small.batches(recipe, step, masked=True)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            student = theirs(input_ids=batch.tokens).logits
            with torch.no_grad():
                target = theirs_teacher(input_ids=batch.tokens).logits
            entropy = F.cross_entropy(student.flatten(0, 1), batch.labels.flatten(), reduction="none")
            losses = [entropy.view(batch.labels.shape), plain_divergence(student, target, 2.0)]
            sums = sums + torch.stack([(loss * batch.loss_mask).sum() for loss in losses])
        loss, nats = sums / sum(batch.loss_mask.sum() for batch in batches)
        optimizer.zero_grad()
        (0.33 * loss + 0.67 * 4 * nats).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item()
        optimizer.step()
        result = ours.train_step(batches, step, 3e-3)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5), step
        assert result.distillation == pytest.approx({"distillation_loss": nats.item()}, rel=1e-5), step
        assert result.grad_norm == pytest.approx(norm, rel=1e-4), step
        seen.append(nats.item())
    assert seen[-1] < 0.95 * seen[0], "the student learns from it: else the comparison says little"


def test_who_teaches_itself_learns_nothing_from_it(single: topology.Topology) -> None:
    """To the bit: no divergence, and no gradient of it; the loss is that without a teacher."""
    plain = small.recipe(moe={"aux_loss_coefficient": 0.0}, parallel={"zero_stage": 0})
    results = {}
    for weight in (1.0, 0.25):
        recipe = with_teacher(plain, weight=weight)
        engine = engine_of(recipe, single, teach(recipe, plain, single))
        results[weight] = engine.train_step(small.batches(recipe, 0), 0, 0.0)
        assert results[weight].distillation == {"distillation_loss": 0.0}
    alone = engine_of(plain, single, None).train_step(small.batches(plain, 0), 0, 0.0)
    assert results[1.0].grad_norm == 0
    assert alone.grad_norm > 0.1
    assert results[0.25].grad_norm == pytest.approx(0.75 * alone.grad_norm, rel=1e-6)
    assert results[0.25].loss == alone.loss


STATEFUL = {
    "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "moe": {"jitter": 0.05, "bias_update_rate": 0.01, "capacity_factor": 1.0},
}


def test_weight_0_is_no_teacher(single: topology.Topology, tmp_path: Path) -> None:
    """To the bit: whatever a teacher of the same kind of layers is and has, with dropout and jitter; evaluation too."""
    plain = small.recipe(**STATEFUL)
    own = small.recipe(
        {**WIDE, "hidden_dropout": 0.5}, {"capacity_factor": 0.5}, sparsity={"weights": {"method": "ste"}}
    )
    author = engine_of(own, single, None)
    author.train_step(small.batches(own, 0), 0, 1e-3)
    Saver(author, tmp_path, "").save(1)
    outcomes = []
    for weight in (None, 0.0, 0.5):
        torch.manual_seed(7)
        recipe = plain if weight is None else with_teacher(plain, weight=weight)
        chunks, state = build_model(recipe, single, small.VOCAB)
        teacher = None
        if weight is not None:
            theirs = teacher_recipe(recipe, own, tmp_path, 1)
            teacher = load_teacher(recipe, Source(tmp_path / "step_1", theirs, 1), single, small.VOCAB)
        engine = Engine(recipe, single, chunks, state, teacher)
        results = [everything_but_distillation(engine.train_step(b, s, 3e-3)) for s, b in steps(recipe, 3)]
        outcomes.append((results, engine.evaluate(small.batches(recipe, 9)), state_of(engine)))
    none, zero, half = outcomes
    assert zero[:2] == none[:2]
    assert_same(zero[2], none[2])
    assert half[0][1] != none[0][1], "another weight is seen"


def test_a_teacher_computes_in_the_precision_of_training(single: topology.Topology) -> None:
    """In bf16 a student is its own teacher to the last bit. megatron-core makes some weights in float32, as learned
    positions, and torch's LayerNorm refuses to mix."""
    how = {"position_embedding": "learned", "normalization": "LayerNorm"}
    plain = small.recipe(how, {}, training={"precision": "bf16"}, parallel={"zero_stage": 1})
    recipe = with_teacher(plain, weight=0.5)
    teacher = teach(recipe, plain, single)
    engine = engine_of(recipe, single, teacher)
    assert {p.dtype for p in teacher.chunks.parameters()} == {p.dtype for p in engine.chunks.parameters()}
    assert engine.train_step(small.batches(recipe, 0), 0, 1e-3).distillation["distillation_loss"] == 0.0


def steps(recipe: Recipe, count: int) -> list[tuple[int, list[Batch]]]:
    return [(step, small.batches(recipe, step)) for step in range(count)]


def everything_but_distillation(result: StepResult) -> dict[str, Any]:
    found = {**vars(result), "expert_tokens": result.expert_tokens.tolist()}
    del found["distillation"]
    return found


def test_one_micro_batch_of_logits_at_a_time(single: topology.Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the micro-batch before are gone when the next ones are made; none is left after the step."""
    recipe = with_teacher(small.recipe())
    teacher = teach(recipe, small.recipe(WIDE), single)
    made: list[weakref.ref] = []
    run = teacher._logits

    def watched(batches: list[Batch]) -> list[Tensor]:
        assert [ref() for ref in made] == [None] * len(made)
        found = run(batches)
        made.extend(weakref.ref(tensor) for tensor in found)
        return found

    monkeypatch.setattr(teacher, "_logits", watched)
    engine = engine_of(recipe, single, teacher)
    engine.train_step(small.batches(recipe, 0), 0, 1e-3)
    engine.evaluate(small.batches(recipe, 1))
    assert len(made) == 4, "evaluation has no teacher"
    assert [ref() for ref in made] == [None] * 4


def test_a_teacher_stays_as_it_is(single: topology.Topology) -> None:
    """No weight, buffer or counter of it moves, and the scale of the student's auxiliary losses is the student's."""
    own = small.recipe(WIDE, {"bias_update_rate": 0.01, "jitter": 0.1}, sparsity={"weights": {"method": "s_ste"}})
    recipe = with_teacher(
        small.recipe(
            {"sparse_attention": {"selector": "gate", "blocks": 4, "block_size": 4}, "init_std": 0.3},
            training={"precision": "fp16", "loss_scale": 512.0},
        ),
        weight=0.0,
    )
    teacher = teach(recipe, own, single)
    before = {name: tensor.clone() for name, tensor in teacher.chunks.state_dict().items() if tensor is not None}
    norms = []
    for engine in (engine_of(recipe, single, teacher), engine_of(recipe, single, None)):
        norms.append([engine.train_step(b, s, 1e-3).grad_norm for s, b in steps(recipe, 2)])
    after = {name: tensor for name, tensor in teacher.chunks.state_dict().items() if tensor is not None}
    assert_same(after, before)
    assert not any(module.training for module in teacher.chunks.modules())
    assert norms[0] == norms[1]


# The recipe it runs with ----------------------------------------------------------------------------------------------


def test_the_teachers_recipe_is_its_own_model_in_the_students_run() -> None:
    student = with_teacher(
        small.recipe(
            {"num_layers": 4},
            {},
            {"precision": "bf16", "recompute": "full", "micro_batch_size": 1},
            data={"document_mask": True, "seq_length": 16},
            parallel={"pp": 2, "ep": 2, "layers_per_stage": [1, 3]},
        )
    )
    own = small.recipe(
        {"position_embedding": "learned", "normalization": "LayerNorm"},
        training={"global_batch_size": 64, "steps": 100},
        sparsity={"weights": {"method": "ste", "mvue": "exact"}},
    )
    found = teacher_recipe(student, own, Path("x"), 4)
    assert found.model == own.model.model_copy(update={"max_position_embeddings": small.SEQ})
    assert found.data == student.data
    assert found.parallel == student.parallel.model_copy(update={"ep": 1, "layers_per_stage": None})
    assert (found.training.precision, found.training.micro_batch_size, found.training.steps) == ("bf16", 1, 100)
    assert found.sparsity.weights == config.WeightSparsity(method="ste")
    pooled = small.recipe({"num_layers": 4}, {"aux_loss_scope": "all_layers"})
    assert teacher_recipe(student, pooled, Path("x"), 4).parallel.ep == 2, "a rule of its training is no rule here"


@pytest.mark.parametrize(
    ("parallel", "world", "own", "said"),
    [
        (
            {"tp": 2},
            2,
            {"num_query_groups": 1},
            "the teacher in the student's layout tp2 on 2 processes: model.num_query_groups=1 is not divisible by tp=2",
        ),
        ({"pp": 4}, 4, {}, "layout pp4 on 4 processes: pp * vp = 4 stages are more than model.num_layers=2"),
        (
            {},
            1,
            {"position_embedding": "learned", "max_position_embeddings": 8},
            "data.seq_length=24 is more than model.max_position_embeddings=8",
        ),
    ],
    ids=["heads", "layers", "positions"],
)
def test_a_teacher_that_cannot_be_is_named(
    parallel: dict[str, Any], world: int, own: dict[str, Any], said: str
) -> None:
    student = with_teacher(small.recipe({"num_layers": 4}, parallel=parallel))
    check_layout(student, world)
    raw = {**small.recipe().model_dump(mode="json")}
    raw["model"].update(own)
    data = {**raw["data"], "seq_length": 8}
    with pytest.raises(ValueError, match=r"training\.teacher\.checkpoint=runs/x/step_1: ") as error:
        teacher_recipe(student, parse_recipe({**raw, "data": data}), Path("runs/x/step_1"), world)
    assert said in str(error.value)
    assert "\n" not in str(error.value)

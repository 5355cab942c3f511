"""The training loop, top to bottom: check, build, resume, train, evaluate, save, report."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasparse import deepspeed_profilers, hopper, platform, supervisor, topology
from megasparse import layout as layouts
from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.load import check_resumable, load
from megasparse.checkpoint.save import Saver
from megasparse.checkpoint.weights import (
    about_initial,
    about_teacher,
    initial_source,
    load_initial,
    load_teacher,
    teacher_source,
)
from megasparse.config import Recipe
from megasparse.data.loader import TrainingData, ValidationWindows
from megasparse.engine import Engine, StepResult
from megasparse.faults import FaultLog, Steps, refuse_differing, roll_back
from megasparse.flops import flops_per_token, matmul_flops
from megasparse.generate import generate
from megasparse.launch import launch
from megasparse.layers.router import load_by_layer
from megasparse.metrics.environment import write_environment
from megasparse.metrics.log import MetricsLogger
from megasparse.metrics.plot import plot_loss
from megasparse.metrics.record import read_metrics
from megasparse.model import build_model
from megasparse.parameters import parameter_count
from megasparse.profiling import Profiler
from megasparse.pulse import Pulse
from megasparse.schedule import learning_rate
from megasparse.signals import Signals
from megasparse.sparsity import weight as sparsity
from megasparse.topology import Topology

SAMPLE_TOKENS = 120


def train(recipe: Recipe, run_dir: Path, resume: bool = False, checkpoint_name: str | None = None) -> bool:
    """Train ``recipe`` into ``run_dir``; every rank of the job calls it. ``resume``: from the latest checkpoint in it,
    or from the one named. False if it was asked to end by a signal, and has saved.

    Raises ValueError for what the user can mend (data, layout, a run folder in use), before any work is done.
    """
    training = recipe.training
    platform.activate()
    world_size = launch().world_size
    layout = layouts.check_layout(recipe, world_size)
    data = TrainingData(recipe.data, training.seed)
    validation = ValidationWindows(recipe.data)
    vocab_size = vocabulary(recipe, data.vocab_size)
    checkpoint = checkpoint_to_resume(run_dir, resume, checkpoint_name, recipe, data.fingerprint)
    initial = None if checkpoint else initial_source(recipe, vocab_size, data.tokenizer.hash)
    taught_by = teacher_source(recipe, vocab_size, data.tokenizer.hash, world_size)

    place = topology.initialize(layout, training.seed, timedelta(minutes=recipe.faults.hang_minutes + 1))
    chunks, step_state = build_model(recipe, place, vocab_size)
    teacher = load_teacher(recipe, taught_by, place, vocab_size) if taught_by else None
    engine = Engine(recipe, place, chunks, step_state, teacher)
    first_step = load(engine, checkpoint) if checkpoint else 0
    fresh = load_initial(engine, initial) if initial else []
    saver = Saver(engine, run_dir / "checkpoints", data.fingerprint, data.tokenizer, data.sets)
    if place.rank == 0:
        if checkpoint:
            checkpoints.set_latest(checkpoint)  # killed before the next one, the run goes on from here again
        sources = {"initial_checkpoint": initial, "teacher": taught_by}
        identities = {name: source.identity for name, source in sources.items() if source}
        write_environment(run_dir, recipe, vocab_size, identities)
    log = MetricsLogger(run_dir, recipe, first_step + 1, place.rank)
    announce(log, recipe, place, vocab_size, checkpoint)
    for note in [*layouts.notes(recipe, world_size), *sparsity.notes(recipe, chunks), *hopper.notes(recipe)]:
        log.say(note)
    if initial:
        log.say(about_initial(recipe, initial, fresh))
    if taught_by:
        log.say(about_teacher(recipe, taught_by))
    speed = Speed.measure(recipe, place, vocab_size)
    supervisor.tell(say="run_dir", path=str(run_dir.resolve()))
    beats = supervisor.Beats(recipe.faults.hang_minutes)
    faults = FaultLog(run_dir, log.say)
    steps = Steps(engine, faults)
    pulse = Pulse(place, recipe.faults.straggler_interval, recipe.faults.straggler_factor)
    profiler = Profiler(run_dir, place.rank, recipe.logging, first_step + 1)
    if checkpoint:
        steps.begin_anew(checkpoints.read_manifest(checkpoint).get("faults", {}))

    step, rollbacks, stop = first_step, 0, None
    with Signals() as signals, contextlib.closing(profiler):
        while step < training.steps and stop is None:
            started = time.perf_counter()
            batches = data.step(
                step * training.global_batch_size,
                training.global_batch_size,
                training.micro_batch_size,
                place.dp_rank,
                place.dp,
            )
            tokens_seen = (step + 1) * recipe.tokens_per_step
            rate = learning_rate(tokens_seen, recipe.optimizer, recipe.schedule, recipe.total_tokens)
            result = steps.step(batches, step, rate)
            heard = pulse.exchange(signals, engine.own_seconds)
            metrics = step_metrics(result, rate, tokens_seen)
            timing = speed.timing(time.perf_counter() - started, result.attention.get("block_density", 1.0))

            step += 1
            if heard.profile:
                profiler.request()
            profiler.step(step)
            last, stop = step == training.steps, heard.stop
            if not last and due(step, training.eval_interval):
                windows = validation.batches(training.micro_batch_size, place.dp_rank, place.dp, training.eval_tokens)
                nats, tokens = engine.evaluate(beats.during(windows))
                metrics["validation_loss"] = nats / tokens
            if last:
                deepspeed_profilers.print_messages(recipe)
                metrics |= final_evaluation(engine, recipe, place, log, beats)
            stages = {"stage_seconds": heard.stage_seconds, "stage_memory_gib": heard.stage_memory}
            log.log(step, metrics, {**timing, **stages, "rank_spread": heard.spread})
            beats.beat(step)
            for straggler in pulse.stragglers():
                faults.note("straggler", str(straggler), step, straggler.rank, straggler.host)
            if steps.given_up:
                saver.wait()
                step = roll_back(steps, log, step, rollbacks)
                rollbacks += 1
                continue
            save = last or stop is not None or due(step, training.save_interval)
            if due(step, recipe.faults.check_replicas_interval) or (save and recipe.faults.check_replicas_interval):
                refuse_differing(engine, faults, step)
            if save:
                if saver.has_saved and not saver.folder.exists():
                    faults.note("disk", f"{saver.folder} is gone, and the checkpoints with it: writing a new one", step)
                saver.save(step, steps.spikes.state())
            beats.beat()
    saver.wait()
    if stop is not None and step < training.steps:
        faults.note("signal", f"{stop}: saved, to go on from here start it again with --resume", step)
        log.close()
        dist.barrier()
        return False
    report(log, engine, recipe, place, data, run_dir)
    log.close()
    dist.barrier()
    return True


def vocabulary(recipe: Recipe, tokenizer_size: int) -> int:
    """Rows of the embedding: the recipe's, if it says so, and at least the tokenizer's."""
    size = recipe.model.vocab_size
    if size is not None and size < tokenizer_size:
        raise ValueError(f"model.vocab_size={size} is less than the tokenizer's {tokenizer_size} tokens: raise it")
    return size or tokenizer_size


def checkpoint_to_resume(
    run_dir: Path, resume: bool, name: str | None, recipe: Recipe, fingerprint: str
) -> Path | None:
    """The checkpoint to go on from (None: start anew), checked against the recipe."""
    folder = run_dir / "checkpoints"
    if name is not None and not resume:
        raise ValueError(f"--checkpoint {name} is what to go on from: add --resume")
    checkpoint = checkpoints.latest(folder) if name is None else folder / name
    if not resume:
        if checkpoint is not None:
            raise ValueError(f"{run_dir} holds a run already ({checkpoint.name}): add --resume or choose --run-dir")
        return None
    if checkpoint is None:
        raise ValueError(f"--resume: no checkpoint in {folder}: start without --resume")
    check_resumable(checkpoint, recipe, fingerprint)
    return checkpoint


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def step_metrics(result: StepResult, rate: float, tokens_seen: int) -> dict[str, Any]:
    """What a step's record holds: nothing in it depends on the clock."""
    metrics: dict[str, Any] = {
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens": tokens_seen,
        **result.aux_losses,
        **result.attention,
        **result.sparsity,
        **result.distillation,
    }
    if len(result.expert_tokens):
        loads = load_by_layer(result.expert_tokens)
        metrics["expert_load"] = max(loads)
        metrics["expert_load_by_layer"] = [float(f"{load:.4g}") for load in loads]
        metrics["dropped_fraction"] = result.dropped_fraction
    if result.skipped:
        metrics["skipped"] = 1
    if result.loss_scale != 1.0:
        metrics["loss_scale"] = result.loss_scale
    return metrics


@dataclass
class Speed:
    """Tokens per second, and the share of the devices' measured matrix-product rate that the model's FLOPs are; a
    teacher takes time and counts none."""

    recipe: Recipe
    vocab_size: int
    device_flops: float  # FLOP/s of all ranks together

    @staticmethod
    def measure(recipe: Recipe, place: Topology, vocab_size: int) -> Speed:
        dist.barrier()  # ranks that share a host measure together
        rate = torch.tensor(matmul_flops(platform.DTYPES[recipe.training.precision]), device=platform.device())
        dist.all_reduce(rate)
        return Speed(recipe, vocab_size, rate.item())

    def timing(self, seconds: float, block_density: float) -> dict[str, float]:
        model, seq = self.recipe.model, self.recipe.data.seq_length
        rate = self.recipe.tokens_per_step / seconds
        flops = flops_per_token(model, self.vocab_size, seq, block_density)
        return {"seconds": seconds, "tokens_per_second": rate, "mfu": rate * flops / self.device_flops}


def announce(log: MetricsLogger, recipe: Recipe, place: Topology, vocab_size: int, checkpoint: Path | None) -> None:
    total, active = parameter_count(recipe.model, vocab_size, recipe.data.seq_length)
    log.say(
        f"{recipe.name}: {total:,} parameters, {active:,} active per token; {place} on {place.world_size} "
        f"x {platform.device()}, {recipe.training.precision}; "
        f"{recipe.training.steps} steps of {recipe.tokens_per_step:,} tokens"
        + (f"; resumed from {checkpoint}" if checkpoint else "")
    )


def final_evaluation(
    engine: Engine, recipe: Recipe, place: Topology, log: MetricsLogger, beats: supervisor.Beats
) -> dict[str, Any]:
    """Every held-out token scored once: nats per token, bits per byte, and what gzip -9 and xz need for the same."""
    log.say("evaluating on every held-out token")
    stride = recipe.training.eval_stride or max(1, recipe.data.seq_length // 4)
    windows = ValidationWindows(recipe.data, stride)
    batches = windows.batches(recipe.training.micro_batch_size, place.dp_rank, place.dp)
    nats, tokens = engine.evaluate(beats.during(batches))
    size = windows.utf8_bytes()
    return {
        "validation_loss": nats / tokens,
        "validation_bits_per_byte": nats / math.log(2) / size,
        "gzip9_bits_per_byte": 8 * windows.gzip9_bytes / size,
        "xz_bits_per_byte": 8 * windows.xz_bytes / size,
        "validation_bytes": size,
    }


def report(
    log: MetricsLogger, engine: Engine, recipe: Recipe, place: Topology, data: TrainingData, run_dir: Path
) -> None:
    """What the user sees at the end: the score beside the compressors', a sample, the picture, how to go on."""
    prompt = data.tokenizer.encode("def ")
    tokens = generate(
        engine.chunks,
        recipe,
        place,
        prompt,
        SAMPLE_TOKENS,
        temperature=0.8,
        seed=recipe.training.seed,
        stop=data.tokenizer.eod,
    )
    if place.rank != 0:
        return
    log.say(f"\nsample: {data.tokenizer.decode(prompt + tokens)}\n")
    final = read_metrics(run_dir)[-1]
    log.say(
        f"held-out text, {final['validation_bytes']:,} bytes: loss {final['validation_loss']:.4f} nats/token, "
        f"{final['validation_bits_per_byte']:.3f} bits/byte "
        f"(gzip -9 {final['gzip9_bits_per_byte']:.3f}, xz {final['xz_bits_per_byte']:.3f})"
    )
    log.say(f"loss curve: {plot_loss(run_dir)}")
    launcher = "megasparse" if place.world_size == 1 else f"deepspeed --num_gpus {place.world_size} --module megasparse"
    more = f"training.steps={2 * recipe.training.steps}"
    log.say(f"to train on: {launcher} train {run_dir / 'recipe.yaml'} --run-dir {run_dir} --resume {more}")

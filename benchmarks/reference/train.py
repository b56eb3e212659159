"""Train a reference model on prepared tokens, on a CPU, from checkpoint to checkpoint.

    python benchmarks/reference/prepare.py --output work
    python benchmarks/reference/train.py --model llama --data work --output work/llama

Started again with the same arguments, it goes on from its last checkpoint and ends in the same weights as if it had
never stopped: the batch and the learning rate of a step follow from its number, and the checkpoint holds the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel


COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        **COMMON,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=6,
        num_attention_heads=10,
        num_key_value_heads=5,
    ),
    "moe": MixtralConfig(
        **COMMON,
        hidden_size=256,
        intermediate_size=336,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    ),
}


@dataclass(frozen=True)
class Schedule:
    """How any model is trained.

    Args:
        steps: planned; the learning rate comes down to nothing at the last.
        batch_size: examples a step.
        learning_rate: after the warm-up.
        warmup: steps in which the learning rate rises.
        weight_decay: of the matrices; vectors have none.
        report_every: steps between lines of the log.
        heldout_every: steps between held-out measurements, a multiple of `report_every`.
        autocast: matrix products in bfloat16, everything else in float32.
        compile: with torch.compile; needs a C++ compiler.
        seed: of the weights and of all that is drawn.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    weight_decay: float
    report_every: int
    heldout_every: int
    autocast: bool = True
    compile: bool = True
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plan(Schedule):
    """How a language model is trained.

    Args:
        heldout_sequences: how many the held-out loss of the log is taken on.
    """

    batch_size: int = 16
    learning_rate: float = 2.5e-3
    warmup: int = 200
    weight_decay: float = 0.1
    report_every: int = 20
    heldout_every: int = 200
    heldout_sequences: int = 64

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a straight rise, then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * part))


@lru_cache(maxsize=2)
def order(sequences: int, seed: int) -> Tensor:
    """The order in which one pass reads the sequences."""
    return torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))


def batch(tokens: Tensor, step: int, plan: Plan) -> Tensor:
    """The sequences of a step `(batch_size, length)`; pass after pass, each in an order of its own."""
    places = range(step * plan.batch_size, (step + 1) * plan.batch_size)
    chosen = [order(len(tokens), plan.seed + 1 + place // len(tokens))[place % len(tokens)] for place in places]
    return tokens[torch.stack(chosen)].long()


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """An untrained model in float32."""
    torch.manual_seed(seed)
    # On a CPU, compiled attention of so few heads takes less time than the flash kernel and its backward pass.
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


class Optimizer(Protocol):
    """What is needed of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...


def make_optimizer(parameters: Iterable[nn.Parameter], plan: Schedule) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


@dataclass
class Run:
    """A training in progress: what a checkpoint holds."""

    model: PreTrainedModel
    optimizer: Optimizer
    step: int = 0
    seconds: float = 0.0


def save(run: Run, path: Path) -> None:
    """Write the checkpoint, whole or not at all."""
    tensors = {}
    for name, parameter in run.model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in run.optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    written = path.with_suffix(".partial")
    save_file(tensors, written, metadata={"step": str(run.step), "seconds": str(run.seconds)})
    os.replace(written, path)


@torch.no_grad()
def load_weights(model: PreTrainedModel, path: Path) -> dict[str, Tensor]:
    """Take the weights from a checkpoint; returns all that it holds."""
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"weight.{name}"])
    return tensors


def resume(run: Run, path: Path) -> None:
    """Take weights, optimizer and counters from a checkpoint."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_weights(run.model, path)
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind != "weight":
            states[name][kind] = tensor
    for name, parameter in run.model.named_parameters():
        run.optimizer.state[parameter] = states[name]
    run.step, run.seconds = int(metadata["step"]), float(metadata["seconds"])


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: Tensor, batch_size: int = 16) -> float:
    """Cross-entropy a token, in nats, over sequences `(N, length)`; the first token of each is given."""
    model.eval()
    total = 0.0
    for ids in tokens.long().split(batch_size):
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def make_forward(model: PreTrainedModel, plan: Plan) -> Callable[[Tensor], Any]:
    """The model's outputs and loss for token ids, in the arithmetic of the plan."""

    def outputs(ids: Tensor) -> Any:
        # Autocast casts the inputs of linear layers, and not the stacked weights of experts.
        experts = {n: p.bfloat16() for n, p in model.named_parameters() if p.ndim == 3} if plan.autocast else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
            return functional_call(model, experts, kwargs={"input_ids": ids, "labels": ids, "use_cache": False})

    return torch.compile(outputs) if plan.compile else outputs


def text_loss(outputs: Any, config: PreTrainedConfig) -> float:
    """The loss without what the router of a mixture adds to it."""
    router = outputs.get("aux_loss")
    return outputs.loss.item() - (0.0 if router is None else config.router_aux_loss_coef * router.item())


def steps(run: Run, loss_of: Callable[[int], tuple[Tensor, float]], plan: Schedule) -> Iterator[tuple[float, float]]:
    """Train step after step; yields what is to be reported of the loss, and the norm of the gradient."""
    while run.step < plan.steps:
        run.model.train()
        for group in run.optimizer.param_groups:
            group["lr"] = plan.rate(run.step)
        loss, reported = loss_of(run.step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        yield reported, norm.item()


def follow(
    run: Run,
    loss_of: Callable[[int], tuple[Tensor, float]],
    measure: Callable[[], dict[str, Any]],
    output: Path,
    plan: Schedule,
    *,
    hours: float,
    stop_after: int | None,
    checkpoint_minutes: float,
) -> Run:
    """Train from the last checkpoint in a folder, or from the start, and leave a checkpoint and a log there.

    Args:
        run: at its start.
        loss_of: of a step, counted from 0: the loss, and what is to be reported of it.
        measure: what the log says of held-out data, of the model in evaluation mode and in the plan's arithmetic.
        output: folder of `checkpoint.safetensors` and `log.jsonl`.
        plan: of the training.
        hours: stop when this call has taken as long.
        stop_after: stop after this many steps of this call.
        checkpoint_minutes: between checkpoints.

    Returns:
        The run: done if its step is the last of the plan.
    """
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, log = output / "checkpoint.safetensors", output / "log.jsonl"
    if checkpoint.exists():
        resume(run, checkpoint)
    # What was logged after the checkpoint is about to happen again.
    kept = [line for line in read_log(log) if line["step"] <= run.step]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    began = saved = time.perf_counter()
    before, first = run.seconds, run.step
    losses: list[float] = []
    for loss, norm in steps(run, loss_of, plan):
        losses.append(loss)
        if run.step % plan.report_every == 0 or run.step == plan.steps:
            line = {"step": run.step, "loss": sum(losses) / len(losses), "gradient_norm": norm}
            losses = []
            if run.step % plan.heldout_every == 0 or run.step == plan.steps:
                run.model.eval()
                with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
                    line |= measure()
            run.seconds = before + time.perf_counter() - began
            line |= {"rate": plan.rate(run.step - 1), "seconds": round(run.seconds, 1)}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        now = time.perf_counter()
        out_of_time = now - began > hours * 3600 or run.step - first == stop_after
        if now - saved > checkpoint_minutes * 60 or out_of_time or run.step == plan.steps:
            run.seconds = before + now - began
            save(run, checkpoint)
            saved = now
        if out_of_time:
            break
    run.model.eval()
    return run


def train(
    config: PreTrainedConfig,
    tokens: Tensor,
    heldout: Tensor,
    output: Path,
    plan: Plan,
    *,
    hours: float = math.inf,
    stop_after: int | None = None,
    checkpoint_minutes: float = 3.0,
) -> Run:
    """Train from the last checkpoint in `output`, or from the start, and leave a checkpoint there.

    Args:
        config: of the model.
        tokens: to train on, `(N, length)`.
        heldout: to report the loss on, `(N, length)`.
        output: folder of `checkpoint.safetensors` and `log.jsonl`.
        plan: must be the same every time.
        hours: stop when this call has taken as long.
        stop_after: stop after this many steps of this call.
        checkpoint_minutes: between checkpoints.

    Returns:
        The run: done if its step is the last of the plan.
    """
    model = build(config, plan.seed)
    forward = make_forward(model, plan)

    def loss_of(step: int) -> tuple[Tensor, float]:
        outputs = forward(batch(tokens, step, plan))
        return outputs.loss, text_loss(outputs, config)

    def measure() -> dict[str, Any]:
        return {"heldout_loss": mean_loss(model, heldout[: plan.heldout_sequences])}

    return follow(
        Run(model, make_optimizer(model.parameters(), plan)), loss_of, measure, output, plan,
        hours=hours, stop_after=stop_after, checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--steps", type=int, required=True, help="planned; the same whenever it is started again")
    parser.add_argument("--hours", type=float, default=math.inf, help="stop then, to go on when started again")
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = Plan(args.steps, args.batch_size, args.learning_rate, compile=not args.no_compile)
    config = MODELS[args.model]
    tokens = load_file(args.data / "tokens.safetensors")
    run = train(config, tokens["train"], tokens["heldout"], args.output, plan, hours=args.hours)
    done = {"model": args.model, "step": run.step, "of": plan.steps, "seconds": round(run.seconds), **asdict(plan)}
    done |= {"python": platform.python_version(), "torch": torch.__version__, "threads": args.threads}
    (args.output / "plan.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(done))


if __name__ == "__main__":
    main()

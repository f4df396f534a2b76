"""Train the GPT of train_gpt.py under FSDP2, and go on when a rank dies.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_fsdp.py --out runs/fsdp

Each rank keeps a shard of params and state; the optimizer clips by the norm over all shards. When a
rank is killed, torchrun starts all of them again, and they go on from the last checkpoint that is
whole, bitwise as if nothing had happened.
``--out`` receives step-N/ (a distributed checkpoint) and report.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

import gpt_data
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from gpt_model import GPT, SIZES, param_groups
from gpt_trainer import MAX_GRAD_NORM, WEIGHT_DECAY, cosine_with_warm_up, write_aside
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

import fusedopt


def join(backend: str) -> None:
    """Meets the other ranks. torchrun keeps its store when it starts ranks again (torch 2.13):
    under the same keys, a rank would find the addresses of ranks that are gone."""
    store, rank, world = next(rendezvous("env://"))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"restart-{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was renamed, so is whole."""
    return max(out.glob("step-??????"), default=None)


def save(out: Path, step: int, state: dict) -> None:
    """Writes a checkpoint aside, all ranks together; it gets its name when it is whole."""
    aside, path = out / "writing", out / f"step-{step:06}"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    dist.barrier()
    dcp.save(state, checkpoint_id=aside)
    dist.barrier()
    if dist.get_rank() == 0:
        before = last_checkpoint(out)
        aside.rename(path)
        if before is not None and before != path:
            shutil.rmtree(before)
    dist.barrier()


def digest(model: GPT) -> str | None:
    """SHA-256 over all params, gathered; only on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    if dist.get_rank() != 0:
        return None
    parts = (value.numpy().tobytes() for value in whole.values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def train(
    out: Path, size: str, device: str, steps: int, batch_size: int, every: int, seed: int
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    config = SIZES[size]
    mesh = init_device_mesh(device, (world,))
    torch.manual_seed(seed)
    model = GPT(config).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = param_groups(model, WEIGHT_DECAY["adamw"])
    optimizer = fusedopt.FusedAdamW(groups, betas=(0.9, 0.95), max_grad_norm=MAX_GRAD_NORM)
    history = torch.zeros(steps, 2, dtype=torch.float64)  # loss and gradient norm

    def state(step: int) -> dict:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        progress = {"step": torch.tensor(step), "history": history}
        return {"model": model_state, "optimizer": optimizer_state, "progress": progress}

    start = 0
    checkpoint = last_checkpoint(out)
    if checkpoint is not None:
        loaded = state(0)
        dcp.load(loaded, checkpoint_id=checkpoint)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )
        start = int(loaded["progress"]["step"])
        if rank == 0:
            print(f"resuming at step {start} of {steps}", flush=True)

    corpus = gpt_data.load_corpus()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * cosine_with_warm_up(step, steps)
        whole = gpt_data.batch(corpus.train, seed, step, batch_size, config.context)
        x, y = (part[rank::world].to(device) for part in whole)
        loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        history[step] = torch.stack([mean / world, optimizer.grad_norm]).cpu()
        if rank == 0:
            print(f"step {step}: loss {history[step, 0]:.4f}, norm {history[step, 1]:.4f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            save(out, step + 1, state(step + 1))

    sha256 = digest(model)
    if rank == 0:
        report = {"ranks": world, "history": history.tolist(), "sha256": sha256}
        write_aside(out / "report.json", lambda file: file.write(json.dumps(report).encode()))


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the report.")],
    size: Annotated[Literal[tuple(SIZES)], typer.Option(help="Size of the model.")] = "tiny",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Of all ranks.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step, of all ranks.")] = 8,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
) -> None:
    """Train a small GPT on Python's standard library on the ranks of a torchrun."""
    if "RANK" not in os.environ:
        raise typer.BadParameter("start me with torchrun: see the first lines of this file")
    if batch_size % int(os.environ["WORLD_SIZE"]):
        raise typer.BadParameter("must be a multiple of the number of ranks", param_hint="batch")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    join("nccl" if device == "cuda" else "gloo")
    out.mkdir(parents=True, exist_ok=True)
    train(out, size, device, steps, batch_size, checkpoint_every, seed)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)

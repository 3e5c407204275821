"""Several processes against one: exact means over uneven shares, and sharded training with its checkpoints.

Processes are real ones that talk through gloo on this machine.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision3dgen.engine import (
    Data,
    Optimizer,
    Penalty,
    Record,
    Schedule,
    Sharding,
    Trainer,
    Update,
    Validation,
    gather_items,
    load_weights,
    main_process_first,
    read_metrics,
    share,
)
from vision3dgen.engine.processes import processes
from vision3dgen.engine.sharding import full


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def spawn(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    torch.multiprocessing.spawn(_as_rank, (work, processes, port, arguments), nprocs=processes)


def _as_rank(rank: int, work: Callable[..., None], processes: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
    )  # fmt: skip
    if not torch.accelerator.is_available():
        del os.environ["ACCELERATE_USE_CPU"]  # what torchrun gives on a machine without an accelerator
    work(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads end with the process; joining them at exit may abort it


# Evaluation


def scores(indices: list[int]) -> dict[str, Tensor]:
    """A value and a pair for each item, of very different sizes, so that the order of a sum shows in its bits."""
    values = torch.tensor(indices, dtype=torch.float64)
    return {"loss": (values * 1.7).sin() * 10 ** (values % 7), "pair": torch.stack([values, values**2], 1)}


def measure(folder: Path, counts: list[int]) -> None:
    state, found = processes(), {}
    for count in counts:
        mine = list(share(count))
        found[count] = gather_items(mine, scores(mine), count)
    failures = []
    cases = {
        "missing": ([0] if state.is_main_process else [], 2, scores([0]) if state.is_main_process else {}),
        "repeated": ([0], 1, scores([0])),
        "names": ([state.process_index], 2, {f"only_{state.process_index}": torch.zeros(1)}),
    }
    if state.num_processes == 2:
        for indices, count, values in cases.values():
            try:
                gather_items(indices, values, count)
            except ValueError as error:
                failures.append(str(error))
    torch.save((found, failures), folder / f"{state.process_index}.pt")


COUNTS = [13, 7, 1, 2, 0]


@pytest.mark.slow
def test_uneven_shares_of_three_give_the_mean_of_one_bit_for_bit(tmp_path: Path):
    spawn(measure, 3, tmp_path, COUNTS)
    check_measured(tmp_path, 3)


def check_measured(folder: Path, processes: int) -> None:
    for rank in range(processes):
        found, failures = torch.load(folder / f"{rank}.pt")
        for count in COUNTS[:-1]:
            expected = scores(list(range(count)))
            assert set(found[count]) == {"loss", "pair"}
            for name, values in expected.items():
                assert torch.equal(found[count][name], values)
                assert torch.equal(found[count][name].mean(0), values.mean(0))
        assert found[0] == {}
        if processes == 2:
            missing, repeated, names = failures
            assert "each of 2 items must be measured once; missing [1], repeated []" in missing
            assert "each of 1 items must be measured once; missing [], repeated [0]" in repeated
            assert "every process must measure ['only_0', 'only_1']" in names


def test_one_process_has_every_item():
    assert list(share(5)) == [0, 1, 2, 3, 4]
    values = {"loss": torch.tensor([3.0, 1.0, 2.0])}
    assert gather_items([2, 0, 1], values, 3)["loss"].tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"each of 3 items must be measured once; missing \[2\], repeated \[1\]"):
        gather_items([0, 1, 1], values, 3)
    with pytest.raises(ValueError, match=r"of each of its 2 items, one gave \{'loss': \(3,\)\}"):
        gather_items([0, 1], values, 2)


# Training


class Points:
    def __len__(self) -> int:
        return 29

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.tensor([index / 13 - 1, (index % 5) / 5, (index % 7) / 7], dtype=torch.float64)
        return {"x": x, "y": x.sum(0, keepdim=True).sin()}


class Net(nn.Module):
    """Layers whose sizes two does not divide, tied weights and a buffer."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.block = nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.again, self.last = nn.Linear(5, 5), nn.Linear(5, 1)
        self.again.weight = self.first_weight = self.block[0].weight
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(2.0 + seed))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.block(self.first(x).tanh())).tanh()) * self.scale

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        return {"loss": (self(batch["x"]) - batch["y"]).square().mean()}


def trainer(run: Path, *, batch_size: int, steps: int = 6, seed: int = 0, **update: Any) -> Trainer:
    return Trainer(
        Net(seed),
        Data(Points(), batch_size),
        run,
        steps=steps,
        optimizer=Optimizer("adamw", lr=0.02, weight_decay=0.1, scales={"block": 0.5}, frozen=["first"]),
        schedule=Schedule("cosine", warmup=2),
        update=Update(clip=0.5, accumulate=2, penalty=Penalty(l1=1e-3, l2=1e-2), **update),
        validation=Validation("error", mode="min", every=3),
        record=Record(log_every=1, checkpoint_every=3),
    )


def validate(model: nn.Module) -> dict[str, float]:
    """The mean error over all items, each process measuring its share."""
    mine = list(share(29))
    with torch.no_grad():
        errors = torch.cat([(model(Points()[i]["x"]) - Points()[i]["y"]).square() for i in mine])
    return {"error": gather_items(mine, {"error": errors}, 29)["error"].mean().item()}


def train_all(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    with main_process_first():  # as the command line does before it trains
        folder.mkdir(exist_ok=True)
    measure(folder, COUNTS)
    runs = {"ddp": {}, "fsdp": {"shard": Sharding()}}
    for name, update in runs.items():
        run = trainer(folder / name, batch_size=2, seed=rank, **update)  # the first process's weights start both
        run.fit(validate)
        gradients = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
        if name == "fsdp":
            assert all(p.to_local().numel() < p.numel() for p in run.model.parameters() if len(p) > 1)
            gradients = {n: full(gradient) for n, gradient in gradients.items()}
        torch.save((gradients, run.metrics), folder / f"{name}{rank}.pt")
    # Stopped after step 3 and continued; and with units of its own.
    cut = trainer(folder / "cut", batch_size=2, shard=Sharding(units=["first", "last"]))
    cut.steps = 3
    cut.fit(validate)
    trainer(folder / "cut", batch_size=2, shard=Sharding(units=["last"])).fit(validate, resume=True)
    # A sharded run's checkpoint continues without shards, and the other way round.
    half = trainer(folder / "to_ddp", batch_size=2, shard=Sharding())
    half.steps = 3
    half.fit(validate)
    trainer(folder / "to_ddp", batch_size=2).fit(validate, resume=True)


@pytest.mark.slow
def test_two_processes_sharded_or_not_train_as_one(tmp_path: Path):
    spawn(train_all, 2, tmp_path)
    check_measured(tmp_path, 2)
    alone = trainer(tmp_path / "alone", batch_size=4)
    result = alone.fit(validate)
    gradients = {name: p.grad for name, p in alone.model.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in alone.model.named_parameters() if not name.startswith("first.")}
    expected = alone.model.state_dict()
    for name in ("ddp", "fsdp", "cut", "to_ddp"):
        load_weights(loaded := Net(7), tmp_path / name / "checkpoints" / result.checkpoint.name)
        assert loaded.again.weight is loaded.block[0].weight
        for key, value in loaded.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")
        logs = [
            [(entry[key]) for entry in read_metrics(run) for key in ("loss", "penalty", "grad_norm", "lr")]
            for run in (tmp_path / name, tmp_path / "alone")
        ]
        assert logs[0] == pytest.approx(logs[1], rel=1e-6), name
    for name in ("ddp0", "ddp1", "fsdp0", "fsdp1"):
        found, metrics = torch.load(tmp_path / f"{name}.pt")
        assert metrics == pytest.approx(alone.metrics, rel=1e-9)
        for key, value in gradients.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step_00000006" / "state.pt", weights_only=True)
        for name in ("alone", "fsdp")
    ]
    for index, entries in states[0]["optimizers"]["model"]["state"].items():
        for key, value in entries.items():
            other = states[1]["optimizers"]["model"]["state"][index][key]
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12)


def test_one_process_shards_nothing_and_parts_cannot_be_sharded(tmp_path: Path):
    alone, sharded = (
        trainer(tmp_path / "a", batch_size=4, steps=3),
        trainer(tmp_path / "b", batch_size=4, steps=3, shard=Sharding()),
    )
    for run in (alone, sharded):
        run.fit(validate)
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), sharded.model.parameters()))

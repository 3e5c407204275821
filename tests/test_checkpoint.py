"""Checkpoints under kill -9, full disks and damage; and a killed run that ends with the weights of an unbroken one.

What gets killed is a child of this file run as a program: `test_checkpoint.py save FOLDER` has children die at every
point of writing a checkpoint, `test_checkpoint.py train FOLDER` in the middle of an update. (It also keeps beartype out
of the runs that are compared: its checks draw from Python's global generator.)
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vision3dgen.engine import Data, Optimizer, Record, Result, Schedule, Trainer, Update, Validation, checkpoint
from vision3dgen.engine.checkpoint import CheckpointError


def tiny(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    return model


def weight(model: nn.Linear) -> float:
    return model.weight.flatten()[0].item()


def save(run: Path, step: int, *, best: bool = False, keep: int = 2) -> Path:
    return checkpoint.save(run, step, tiny(step), {"step": step}, best=best, keep=keep, metrics={"iou": step / 10})


def stored(run: Path) -> list[str]:
    """Names in the folder of checkpoints, hidden ones too."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_round_trip(tmp_path: Path):
    state = {"step": 7, "tensors": {"a": torch.arange(5)}, "pair": (1, [2.5, None]), "name": "x"}
    model, average = tiny(1.0), tiny(2.0)
    folder = checkpoint.save(tmp_path, 7, model, state, ema=average, metrics={"iou": 0.5, "bad": float("nan")})
    assert folder == checkpoint.latest(tmp_path)
    found = checkpoint.load(folder, loaded := tiny(), loaded_average := tiny())
    assert found["step"] == 7
    assert found["pair"] == (1, [2.5, None])
    assert found["tensors"]["a"].tolist() == [0, 1, 2, 3, 4]
    assert (weight(loaded), weight(loaded_average)) == (1.0, 2.0)
    meta = checkpoint.load_weights(loaded, folder)
    assert weight(loaded) == 2.0  # the average by default
    assert (meta["step"], meta["metrics"]) == (7, {"iou": 0.5, "bad": None})
    checkpoint.load_weights(loaded, folder, ema=False)
    assert weight(loaded) == 1.0


def test_tied_weights_round_trip(tmp_path: Path):
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    first, second = tied(), tied()
    checkpoint.load(checkpoint.save(tmp_path, 1, first, {}), second)
    assert torch.equal(first[0].weight, second[0].weight)
    assert second[1].weight is second[0].weight


def test_state_that_is_not_plain_does_not_load(tmp_path: Path):
    folder = checkpoint.save(tmp_path, 1, tiny(), {"object": Path("x")})
    with pytest.raises(Exception, match=r"weights_only|WeightsUnpickler"):
        checkpoint.load(folder, tiny())


def test_keeps_the_last_and_the_best(tmp_path: Path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, best=step in (1, 2), keep=2)
    assert stored(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000005"
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoints" / "step_00000002"


def test_a_run_without_checkpoints(tmp_path: Path):
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.best(tmp_path) is None
    save(tmp_path, 1)
    assert checkpoint.best(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize(
    "damage, reason", [("truncate", "is truncated"), ("flip", "is damaged"), ("drop", "is missing")]
)
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str, reason: str):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"step_00000002/{name} {reason}"):
        checkpoint.load(path.parent, tiny())
    with pytest.warns(UserWarning, match=f"passed over: .*step_00000002/{name} {reason}"):
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"


def test_damaged_metadata_is_named_and_all_damaged_is_an_error(tmp_path: Path):
    folder = save(tmp_path, 1)
    (folder / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step_00000001/meta.json is damaged"):
        checkpoint.verify(folder)
    (folder / "meta.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"step_00000001/meta.json is damaged"):
        checkpoint.verify(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.verify(folder)
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError, match="no whole checkpoint in"):
        checkpoint.latest(tmp_path)


def test_another_schema_and_another_model_are_named(tmp_path: Path):
    folder = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not of this model: .*(?s:.)*size mismatch"):
        checkpoint.load_weights(nn.Linear(3, 5), folder)
    with pytest.raises(CheckpointError, match="has no moving average of the weights and this run keeps one"):
        checkpoint.load(folder, tiny(), tiny())
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"schema": 99}))
    with pytest.raises(CheckpointError, match=r"has checkpoint schema 99; vision3dgen .* reads \(1, 2\)"):
        checkpoint.load(folder, tiny())


def test_saving_over_a_damaged_checkpoint(tmp_path: Path):
    folder = save(tmp_path, 2)
    (folder / "meta.json").unlink()
    assert save(tmp_path, 2) == folder
    assert checkpoint.latest(tmp_path) == folder
    save(tmp_path, 3)
    assert stored(tmp_path) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", range(5))  # the syncs of three files, of their folder, and of the folder around it
def test_full_disk_at_any_sync_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int
):
    save(tmp_path, 1)
    calls = iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    words = rf"could not write checkpoint .*step_00000002 .*intact.*{os.strerror(number)}"
    with pytest.raises(OSError, match=words) as caught:
        save(tmp_path, 2)
    # The last sync is that of the parent folder, after the rename: the new checkpoint is then whole and in place.
    assert caught.value.errno == number
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == ("step_00000002" if call == 4 else "step_00000001")
    assert not [name for name in stored(tmp_path) if name.startswith(".")]
    checkpoint.load(found, tiny())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_may_not_be_written_keeps_its_checkpoint(tmp_path: Path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="could not write checkpoint"):
            save(tmp_path, 2)
    finally:
        folder.chmod(0o700)
    checkpoint.load(checkpoint.latest(tmp_path), tiny())


@pytest.mark.parametrize("ema", [None, nn.Linear(100, 100)])
@pytest.mark.parametrize("limit", [2_000, 41_000])  # inside the weights, inside the state
def test_a_real_write_that_fails_midway(tmp_path: Path, limit: int, ema: nn.Module | None):
    save(tmp_path, 1)
    state = {"big": torch.zeros(100_000)}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the kernel refuses bytes beyond it: EFBIG
    try:
        with pytest.raises(OSError, match=r"could not write checkpoint .*step_00000002"):
            checkpoint.save(tmp_path, 2, nn.Linear(100, 100), state, ema=ema)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert stored(tmp_path) == ["step_00000001"]
    checkpoint.load(tmp_path / "checkpoints" / "step_00000001", tiny())


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def deadly_save(run: Path, deadly: int) -> None:
    """Save step 2 and die at sync or rename number `deadly`."""
    calls = iter(range(100))

    def counted(function: Callable) -> Callable:
        def call(*arguments):
            if next(calls) == deadly:
                die()
            return function(*arguments)

        return call

    os.fsync, os.rename = counted(os.fsync), counted(os.rename)
    save(run, 2)


def save_program(folder: Path) -> None:
    """Children die ever later in saving step 2, until one does not; prints what each leaves."""
    save(folder, 1)
    status = -1
    for deadly in range(20):
        status = in_child(lambda deadly=deadly: deadly_save(folder, deadly))
        found = checkpoint.latest(folder)
        assert found is not None
        checkpoint.load(found, tiny())
        print(status, found.name, flush=True)
        if status == 0:
            break


def program(*arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_kill_at_any_point_of_a_write(tmp_path: Path):
    done = program("save", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "passed over" not in done.stderr  # what is not whole is not there
    lines = done.stdout.splitlines()
    assert lines[:5] == ["-9 step_00000001"] * 5  # three files, their folder, the rename
    assert lines[-1] == "0 step_00000002"
    assert set(lines[5:-1]) <= {"-9 step_00000001", "-9 step_00000002"}
    assert stored(tmp_path) == ["step_00000001", "step_00000002"]  # nothing left of the killed ones


class Noisy:
    """Items that draw from all three global generators."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002
        return {"x": torch.full((4,), float(index)) + noise, "y": torch.tensor([index % 3.0])}


class Net(nn.Module):
    """Dropout and the loss draw from global generators, batch norm keeps buffers."""

    def __init__(self, deadly: int = -1, end: Callable[[], None] = die):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.ReLU(), nn.Linear(7, 1))
        self.calls, self.deadly, self.end = 0, deadly, end

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.deadly:
            self.end()
        noise = 1 + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
        error = (self.layers(batch["x"]) - batch["y"]) * noise
        return {"loss": error.square().mean(), "largest": error.abs().amax()}


def train(
    run: Path, workers: int, *, deadly: int = -1, end: Callable[[], None] = die, steps: int = 6, resume: bool = False
) -> tuple[Result, Trainer]:
    """A run that uses all there is to resume; steps of 2 batches of 2, so 11 items end their epoch within step 3."""
    torch.manual_seed(0)
    trainer = Trainer(
        Net(deadly, end),
        Data(Noisy(), batch_size=2, num_workers=workers),
        run,
        steps=steps,
        optimizer=Optimizer("adamw", lr=0.05, weight_decay=0.1),
        schedule=Schedule("cosine", warmup=2),
        update=Update(clip=1.0, accumulate=2, ema=0.9),
        validation=Validation("score", every=2, patience=9),
        record=Record(log_every=2, checkpoint_every=3),
        seed=5,
    )
    return trainer.fit(
        lambda model: {"score": model.layers[0].weight.sum().item() + random.random()}, resume=resume
    ), trainer


def everything(run: Path) -> dict[str, object]:
    """The weights' bits, their average's, and the whole state of a run's end, but for the clock."""
    newest = checkpoint.latest(run)
    assert newest is not None
    state = torch.load(newest / "state.pt", weights_only=True)
    del state["seconds"]
    weights = {name: load_file(newest / f"{name}.safetensors") for name in ("model", "ema")}
    bits = {f"{name}.{key}": value.numpy().tobytes() for name in weights for key, value in weights[name].items()}
    return {"state": repr(state), "best": repr(checkpoint.best(run)).replace(str(run), "")} | bits


def log_of(run: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.startswith(("seconds", "samples"))} for entry in entries]


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_program(folder: Path) -> None:
    """A run to its end; for 0 and 2 workers, one that is killed and one that continues it; prints how each ended."""
    import accelerate  # noqa: F401  (once, and not in each child)

    torch.set_num_threads(1)
    print(in_child(lambda: train(folder / "whole", 0)), flush=True)
    for workers in (0, 2):
        run = folder / f"killed_{workers}"
        # The second batch of step 5. Checkpoints were written after steps 3 and 4.
        print(in_child(lambda run=run, workers=workers: train(run, workers, deadly=10)), flush=True)
        print(len(list((run / "checkpoints").glob("step_00000004"))), len(list((run / "checkpoints").glob("step*6"))))
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "epoch": 2}\n{"step": 8, "lo')  # a later entry, and one that a kill cut off
        print(in_child(lambda run=run, workers=workers: train(run, workers, resume=True)), flush=True)
    run = folder / "preempted"
    print(in_child(lambda: preempted(run)), [path.name for path in sorted((run / "checkpoints").iterdir())], flush=True)
    print(in_child(lambda: train(run, 0, resume=True)), flush=True)


def preempted(run: Path) -> None:
    """The signal of a cluster that takes its machine back goes to the workers too."""
    os.setsid()
    train(run, 2, deadly=5, end=lambda: os.killpg(0, signal.SIGTERM))


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path):
    done = program("train", tmp_path)
    ends = [line for line in done.stdout.splitlines() if not line.startswith("step")]
    killed = ["-9", "1 0", "0"]
    stopped = ["SIGTERM: stopped after step 3, checkpoint saved", "143 ['step_00000002', 'step_00000003']", "0"]
    assert ends == ["0", *killed, *killed, *stopped], done.stdout + done.stderr
    whole = everything(tmp_path / "whole")
    assert len(whole) == 2 + 2 * 9
    assert [entry["step"] for entry in log_of(tmp_path / "whole")] == [2, 4, 6]
    for run in (tmp_path / "killed_0", tmp_path / "killed_2", tmp_path / "preempted"):
        assert everything(run) == whole
        assert log_of(run) == log_of(tmp_path / "whole")


def test_a_finished_run_resumes_to_its_result(tmp_path: Path, one_thread: None):
    done, _ = train(tmp_path, 0)
    again, trainer = train(tmp_path, 0, resume=True)
    assert again == done
    assert trainer.model.calls == 0


def test_resuming_with_other_settings_names_them(tmp_path: Path, one_thread: None):
    train(tmp_path, 0, steps=2)
    with pytest.raises(ValueError, match=r"holds a run .its newest checkpoint is step_00000002.: resume it or move it"):
        train(tmp_path, 0)
    data = Data(Noisy(), batch_size=2)
    trainer = Trainer(
        Net(),
        data,
        tmp_path,
        steps=3,
        optimizer=Optimizer("adamw", lr=0.06, weight_decay=0.1),
        schedule=Schedule("cosine", warmup=2),
        update=Update(clip=1.0, accumulate=2, ema=0.9),
        seed=5,
    )
    with pytest.raises(
        CheckpointError, match=r"cannot resume .*step_00000002: optimizer.model.lr was 0.05 and is now 0.06"
    ):
        trainer.fit(resume=True)


if __name__ == "__main__":
    {"save": save_program, "train": train_program}[sys.argv[1]](Path(sys.argv[2]))

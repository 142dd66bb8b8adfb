"""Snapshots: a state that comes back bit for bit, or is refused in one line; never code."""

import json
import os
import pickle
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import Hostile
from helpers.models import small_config
from safetensors.torch import load_file, save_file

from alpaca.common.errors import UserError, notice
from alpaca.training import snapshots as module
from alpaca.training.parallel import apply_fsdp, process_group
from alpaca.training.snapshots import Snapshots, copy_rows
from fsdp_train import build_optimizer
from model import Llama

NORM, DOWN = "weight.model.norm.weight", "exp_avg.model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def snapshots(tmp_path):
    """Those of a small model, in tmp_path."""
    with process_group("cpu", 1) as (mesh, _):
        model = Llama(small_config())
        apply_fsdp(model, mesh, torch.float32, offload=False)
        optimizer = build_optimizer(model)
        for moments in optimizer.state.values():
            moments["exp_avg"].to_local().normal_()
            moments["exp_avg_sq"].to_local().uniform_()
        yield Snapshots(tmp_path, 2, model, optimizer)


def save(snapshots: Snapshots, step: int) -> Path:
    snapshots.save(step)
    snapshots.finish()
    return snapshots.folder / f"step-{step:06}"


def state(snapshots: Snapshots) -> dict[str, torch.Tensor]:
    return {name: tensor.to_local() for name, tensor in snapshots._tensors().items()}


def test_state_is_restored_bit_for_bit(snapshots, monkeypatch):
    write, training = module.write_part, threading.Event()
    monkeypatch.setattr(module, "write_part", lambda *args: training.wait() and write(*args))
    state(snapshots)[NORM][:3] = torch.tensor([torch.nan, -torch.inf, -0.0])
    saved = {name: tensor.clone() for name, tensor in state(snapshots).items()}
    snapshots.save(7)
    for tensor in state(snapshots).values():  # what training does while the state is written
        tensor.fill_(5)
    training.set()
    snapshots.finish()
    assert snapshots.load() == 7
    for name, tensor in state(snapshots).items():
        assert torch.equal(tensor.view(torch.int32), saved[name].view(torch.int32)), name
    assert {moments["step"].item() for moments in snapshots.optimizer.state.values()} == {7}


def test_state_is_not_copied_over_one_that_is_being_written(snapshots, monkeypatch):
    order, write, copy = [], module.write_part, snapshots._copy

    def slow_write(*args):
        time.sleep(0.05)
        write(*args)
        order.append("written")

    monkeypatch.setattr(module, "write_part", slow_write)
    monkeypatch.setattr(snapshots, "_copy", lambda tensors: order.append("copied") or copy(tensors))
    snapshots.save(1)
    save(snapshots, 2)
    assert order == ["copied", "written"] * 2


class FakeStream:
    """A GPU's stream, whose copies run as late as they may."""

    def __init__(self):
        self.queued, self.waiting = [], threading.Event()

    def run(self):
        while self.queued:
            self.queued.pop(0)()

    def synchronize(self):
        self.waiting.wait()
        self.run()

    def wait_stream(self, other):
        other.run()


def test_state_is_copied_beside_a_gpus_next_step(snapshots, monkeypatch):
    """Simulated: the copies wait for the last step, the files and the next weights for them."""
    current, copy, pinned = FakeStream(), torch.Tensor.copy_, []

    @contextmanager
    def on(stream):
        def queue(self, source, non_blocking):
            assert non_blocking
            stream.queued.append(lambda: copy(self, source))
            return self

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", queue)
            yield

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(module, "pin_memory", lambda *where: pinned.append(where))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        snapshots = Snapshots(snapshots.folder, 2, snapshots.model, snapshots.optimizer)
    for step in (1, 2):
        saved = {name: tensor.clone() for name, tensor in state(snapshots).items()}
        saved[NORM].zero_()
        current.queued.append(state(snapshots)[NORM].zero_)  # of the last step
        snapshots.save(step)
        if step == 1:
            for parameter in snapshots.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            snapshots.optimizer.step()
        snapshots.stream.waiting.set()
        snapshots.finish()
        stored = load_file(part(snapshots.folder / f"step-{step:06}"))
        assert all(torch.equal(stored[name], tensor) for name, tensor in saved.items())
    address = snapshots.staging.data_ptr()
    assert pinned == [(address, 12 * sum(p.numel() for p in snapshots.model.parameters()))]
    monkeypatch.setattr(module, "unpin_memory", lambda where: pinned.append(where))
    snapshots.close()
    assert pinned[1:] == [address] and snapshots.staging is None


def test_snapshot_is_overdue_after_fifteen_minutes(snapshots, monkeypatch):
    now = snapshots.saved
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    assert not snapshots.overdue()
    now += 901
    assert snapshots.overdue()
    save(snapshots, 1)
    assert not snapshots.overdue()


def test_save_removes_all_but_the_newest_states(snapshots):
    for name in ("step-x00009", "step-9", "step-000009.partial"):
        (snapshots.folder / name).mkdir()
    for step in (1, 2, 3, 1_000_000):
        save(snapshots, step)
    assert snapshots.load() == 1_000_000
    names = sorted(path.name for path in snapshots.folder.iterdir())
    assert names == ["step-000003", "step-1000000", "step-9", "step-x00009"]


def test_a_link_among_the_states_is_removed_and_not_followed(snapshots, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "step").touch()
    for name in ("step-000001", "step-000009.partial"):  # a state moved to another disk
        (snapshots.folder / name).symlink_to(elsewhere)
    (snapshots.folder / "a file.partial").touch()
    save(snapshots, 2)
    assert snapshots.load() == 2
    save(snapshots, 3)
    assert sorted(os.listdir(snapshots.folder)) == ["step-000002", "step-000003"]
    assert os.listdir(elsewhere) == ["step"]


def test_rows_are_found_however_they_are_divided():
    whole = torch.arange(22.0).view(11, 2)
    for size in range(1, 13):
        for other in range(1, 13):
            parts = [*whole.split(size), whole[:0]]
            for start in range(0, 11, other):
                rows = torch.empty_like(whole[start:][:other])
                copy_rows(parts, start, rows)
                assert torch.equal(rows, whole[start:][:other])


# ---------------------------------------------------------------- from elsewhere


def edit_header(folder: Path, name: str, **changes) -> None:
    file = folder / "rank-00000.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[name] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def edit_tensors(folder: Path, **changes) -> None:
    file = folder / "rank-00000.safetensors"
    tensors = load_file(file) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


def move_out(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def as_older_version(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"PK")
    (folder / ".metadata").write_bytes(b"\x80")


def part(folder: Path) -> Path:
    return folder / "rank-00000.safetensors"


def index(text: str):
    return lambda folder: (folder / "index.json").write_text(text), "index.json"


HOSTILE = {
    "cut short": (lambda f: os.truncate(part(f), 9000), "rank-00000.safetensors: damaged"),
    "empty": (lambda f: os.truncate(part(f), 0), "rank-00000.safetensors: empty"),
    "no header": (lambda f: part(f).write_bytes(b"\xff" * 9000), "rank-00000.safetensors"),
    "not JSON": (lambda f: part(f).write_bytes(b"\x09" + b"\0" * 7 + b"[" * 99), "rank-00000"),
    "past the end": (lambda f: edit_header(f, NORM, data_offsets=[0, 1 << 40]), "rank-00000"),
    "backwards": (lambda f: edit_header(f, NORM, data_offsets=[256, 0]), "rank-00000"),
    "negative": (lambda f: edit_header(f, NORM, data_offsets=[-256, 0]), "rank-00000"),
    "huge shape": (lambda f: edit_header(f, NORM, shape=[1 << 60]), "rank-00000"),
    "overflow": (lambda f: edit_header(f, NORM, shape=[1 << 33, 1 << 33]), "rank-00000"),
    "no dtype": (lambda f: edit_header(f, NORM, dtype="x" * 10_000), "rank-00000"),
    "integers": (lambda f: edit_header(f, NORM, dtype="I32"), f"{NORM} is not [64] in fp32"),
    "turned": (lambda f: edit_header(f, DOWN, shape=[176, 64]), f"{DOWN} is not [64, 176] in fp32"),
    "one number": (lambda f: edit_tensors(f, **{NORM: torch.ones(())}), f"{NORM} is not [64]"),
    "rows missing": (lambda f: edit_tensors(f, **{NORM: torch.ones(63)}), f"{NORM} is not [64]"),
    "no tensor": (lambda f: edit_tensors(f, **{NORM: None}), f"missing or unexpected {NORM}"),
    "another": (lambda f: edit_tensors(f, **{"x" * 999: torch.ones(1)}), "or unexpected xxx"),
    "no file": (lambda f: part(f).unlink(), "not the index of the 0 files"),
    "a file twice": (lambda f: shutil.copy(part(f), f / "rank-00001.safetensors"), "the 2 files"),
    "a folder": (lambda f: (f / "rank-00001.safetensors").mkdir(), "not a regular file"),
    "a pipe": (lambda f: os.mkfifo(f / "rank-00001.safetensors"), "not a regular file"),
    "numbers outside": (lambda f: move_out(part(f)), "rank-00000.safetensors: a link"),
    "index outside": (lambda f: move_out(f / "index.json"), "index.json: a link"),
    "folder outside": (move_out, "a link"),
    "not a folder": (lambda f: (shutil.rmtree(f), f.write_text("{}")), "Not a directory"),
    "older version": (as_older_version, "made by an older version", "another --out"),
    "index of text": index("step 7"),
    "index is a list": index("[7, 1]"),
    "another step": index('{"step": 8, "ranks": 1}'),
    "many ranks": index('{"step": 7, "ranks": 1e999}'),
    "names files": index('{"step": 7, "ranks": 1, "files": ["../../secret", "/etc/passwd"]}'),
    "deep": index("[" * 100_000),
}


def test_damaged_or_hostile_state_is_refused(snapshots, tmp_path, capsys):
    intact = save(snapshots, 7)
    assert snapshots.load() == 7
    capsys.readouterr()
    for case, (change, *words) in HOSTILE.items():
        snapshots.folder = tmp_path / case
        folder = shutil.copytree(intact, snapshots.folder / intact.name)
        change(folder)
        with pytest.raises(UserError) as caught:
            snapshots.load()
        notice(str(caught.value))
        message = capsys.readouterr().err.strip()
        for word in (*words, str(folder), "remove step-000007 to resume"):
            assert word in message, message
        assert "\n" not in message and len(message) <= 500, message


def test_pickle_in_a_state_is_not_opened(snapshots, tmp_path):
    folder, opened, marker = save(snapshots, 7), [], tmp_path / "it ran"
    watching = False
    sys.addaudithook(lambda event, args: watching and event == "open" and opened.append(args[0]))
    for name in (".metadata", "rank-00000.distcp", "index.pkl"):
        (folder / name).write_bytes(pickle.dumps(Hostile(marker)))
    watching = True
    assert snapshots.load() == 7
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="older version"):
        snapshots.load()
    part(folder).write_bytes(pickle.dumps(Hostile(marker)))
    (folder / "index.json").write_text('{"step": 7, "ranks": 1}')
    with pytest.raises(UserError, match="damaged"):
        snapshots.load()
    watching = False
    names = {Path(os.fsdecode(path)).name for path in opened if not isinstance(path, int)}
    assert names >= {"index.json", "rank-00000.safetensors"}, "the hook sees what is opened"
    assert names.isdisjoint({".metadata", "rank-00000.distcp", "index.pkl"})
    assert not marker.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert marker.exists(), "the trap itself works"

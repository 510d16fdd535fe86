"""Several processes train what one does, and what is lost comes back."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from strategies import SHORT
from torch import nn

from rmprune import processes, runs, training
from rmprune.checkpoints import Checkpoint
from rmprune.errors import PeerError
from rmprune.models import create_model
from rmprune.slimming import Penalty, add_shortcut_bn, scale_parameters
from rmprune.sync_bn import synchronized

TESTS = Path(__file__).parent
CONFIG = dataclasses.replace(
    SHORT, epochs=3, sparsity=0.01, lr=0.002, batch_size=20, sync_bn=True, compile="off"
)


def torchrun(count, source, folder, *options):
    """Run a script in processes that can import the tests; return what it printed."""
    script = folder / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{source}", "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={count}", *options, script, folder],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


TRAIN = """
import os, signal
from pathlib import Path
from test_processes import CONFIG, few
from rmprune import processes, runs

def track(batches, length, label, status):
    lost = processes.rank() == 1 and not processes.is_restarted()
    if "KILL" in sys.argv[-1] and label.startswith("epoch 3") and lost:
        os.kill(os.getpid(), signal.SIGKILL)
    return batches

with processes.joined():
    runs.train(Path(sys.argv[1]), CONFIG, few(), track)
"""


def few():
    """The data of the fixture ``tiny``, for other processes."""
    from conftest import tiny

    return tiny.__wrapped__()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("alone"), CONFIG, few())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same by three processes, whose parts of a batch are not equal."""
    folder = tmp_path_factory.mktemp("shared")
    done = torchrun(3, TRAIN, folder)
    assert done.returncode == 0, done.stderr
    return folder


CHECKS = """
import torch
from test_processes import accuracy_on_two_images, decided, normalised, trained
from rmprune import processes

with processes.joined():
    found = decided(), normalised(processes.part(7)), trained(), accuracy_on_two_images()
    torch.save(found, f"{sys.argv[1]}/{processes.rank()}.pt")
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What three processes found, each."""
    folder = tmp_path_factory.mktemp("checked")
    done = torchrun(3, CHECKS, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def test_three_processes_train_what_one_does(alone, shared):
    metrics, expected = pd.read_csv(shared / "metrics.csv"), pd.DataFrame(list(alone.history))
    assert metrics["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-3)
    # Every test image counts once.
    correct = metrics["test_accuracy"] * 32
    assert (correct % 1 == 0).all()
    assert correct.tolist() == pytest.approx((expected["test_accuracy"] * 32).tolist(), abs=1)


def trained():
    """A model after some steps in float64, where nothing hides behind rounding."""
    torch.manual_seed(0)
    model = add_shortcut_bn(create_model("resnet20").eval()).double().train()
    scales = scale_parameters(model)
    penalty = Penalty(scales, 0.01, dict.fromkeys(scales, 1.0))
    batches = [(torch.randn(20, 3, 8, 8).double(), torch.randint(10, (20,))) for _ in range(4)]
    part = processes.part(20)
    loss_of, _ = training._functions(
        training._shared(model, 20),
        None,
        CONFIG.training(),
        torch.device("cpu"),
        dtype=None,
        compile_it=False,
    )
    with synchronized(model):
        loss = training._train_epoch(
            [(x[part], y[part], None) for x, y in batches],
            [0.01] * 4,
            [1.0] * 4,
            loss_of,
            training.make_optimizer(model, CONFIG.training()),
            penalty,
            training._Meter(20),
        )
    return loss, model.state_dict()


def test_three_processes_take_the_steps_of_one(checked):
    """Images, BNs, gradients and the penalty; the loss itself is computed in float32."""
    loss, state = trained()
    for _, _, (found_loss, found), _ in checked:
        assert found_loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(found, state, rtol=1e-6, atol=1e-6)


def accuracy_on_two_images():
    torch.manual_seed(0)
    data = few()
    data = dataclasses.replace(data, test=data.test.at(slice(2)))
    model, device = create_model("resnet20").eval(), torch.device("cpu")
    return training._accuracy(model, data, device, None, torch.contiguous_format)


def test_more_processes_than_test_images(checked):
    assert [accuracy for *_, accuracy in checked] == [accuracy_on_two_images()] * 3


def test_a_killed_process_is_restarted(shared, tmp_path):
    folder = tmp_path / "KILL"
    folder.mkdir()
    done = torchrun(3, TRAIN, folder, "--max-restarts=1")
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    expected, found = (pd.read_csv(f / "metrics.csv") for f in (shared, folder))
    assert found["epoch"].tolist() == [1, 2, 3]
    assert found["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-4)


def test_another_number_of_processes_goes_on(alone, tmp_path):
    folder = tmp_path / "KILL"
    folder.mkdir()
    assert torchrun(3, TRAIN, folder).returncode != 0
    assert Checkpoint.load(folder / "sparse.pt").epoch == 2
    found = runs.train(folder, CONFIG, few())
    losses, expected = ([row["loss"] for row in run.history] for run in (found, alone))
    assert losses == pytest.approx(expected, rel=1e-3)


def decided():
    """What the processes agree on, and what they hear of a failure."""
    number = processes.agreed(lambda: 7 + processes.rank())
    try:
        processes.agreed(lambda: 1 / (number - 7))
    except (ZeroDivisionError, PeerError) as error:
        return processes.count(), number, type(error).__name__
    return None


def test_the_first_process_decides(checked):
    outcomes = [outcome for outcome, *_ in checked]
    assert outcomes == [(3, 7, "ZeroDivisionError"), *[(3, 7, "PeerError")] * 2]


def test_one_process_is_the_first():
    assert (processes.rank(), processes.count(), processes.is_first()) == (0, 1, True)
    assert processes.agreed(lambda: 3) == 3
    values = torch.arange(5)
    assert processes.total(values).equal(values)
    assert values[processes.part(5)].equal(values)
    with pytest.raises(ZeroDivisionError):
        processes.agreed(lambda: 1 / 0)


def normalised(part):
    """What a BN makes of its part of a batch, and what it learns from it."""
    generator = torch.Generator().manual_seed(0)
    bn = nn.BatchNorm2d(3).double()
    nn.init.uniform_(bn.weight, generator=generator)
    x = torch.randn(7, 3, 4, 5, generator=generator).double() * 3 + 100
    weights = torch.randn(7, 3, 4, 5, generator=generator).double()
    x.requires_grad_()
    with synchronized(bn):
        y = bn(x[part])
        (y * weights[part]).sum().backward()
    whole = [torch.zeros_like(x), processes.total(x.grad)]
    whole[0][part] = y.detach()
    gradients = [processes.total(p.grad) for p in bn.parameters()]
    return [processes.total(whole[0]), whole[1], *gradients, *bn.buffers()]


def test_synchronized_bns_are_torchs_of_the_whole_batch(checked):
    expected = normalised(slice(None))
    for _, found, *_ in checked:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

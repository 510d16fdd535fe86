"""Runs of models that are no chains of residual blocks: stages, budgets, resuming."""

import dataclasses

import pytest
import torch
from strategies import SHORT
from torch import nn

from rmprune import models, pruning, runs
from rmprune.budgets import deployed_ratio
from rmprune.checkpoints import Checkpoint, deploy
from rmprune.errors import ConversionError, UsageError
from rmprune.measure import count_params
from rmprune.models import registry
from rmprune.models.repvgg import RepVGG, Stage
from rmprune.plain import PlainNet
from rmprune.store import load

CONFIG = dataclasses.replace(
    SHORT, model="small_repvgg", lowering="plain", sparsity=0.02, target="params=0.6", batch_size=16
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::rmprune.measure.WideSpreadWarning"),
    pytest.mark.filterwarnings("ignore:all channels of layer"),
]


@pytest.fixture(scope="module", autouse=True)
def small_repvgg():
    """A RepVGG with reserving that trains in a second."""

    def build(num_classes):
        return RepVGG([Stage(8, 3, 1), Stage(16, 3, 2)], num_classes, 0.5)

    class WithSoftmax(nn.Conv2d):
        def forward(self, x):
            return (x + super().forward(x).softmax(1)).mean((2, 3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._BUILDERS, "with_softmax", lambda _: WithSoftmax(3, 3, 1))
        patch.setitem(registry._BUILDERS, "small_repvgg", build)
        yield


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sparse = runs.train(folder, CONFIG, tiny)
    masked = pruning.prune(sparse, CONFIG, folder, tiny)
    return folder, sparse, masked, runs.finetune(folder, masked, CONFIG, tiny)


def test_the_trained_model_is_the_model_itself(run):
    _, sparse, _, _ = run
    assert sparse.model.keys() == models.create_model("small_repvgg").state_dict().keys()
    assert isinstance(sparse.build(), RepVGG)


def test_the_whole_pipeline(run, tiny):
    folder, sparse, masked, finetuned = run
    assert isinstance(masked.build(), PlainNet)
    assert masked.narrowed.removed > 0
    net = load(folder / "net.safetensors")
    assert net.is_plain
    assert count_params(net) < count_params(deploy(sparse))
    x = torch.randn(2, *tiny.image_shape)
    with torch.no_grad():
        expected = finetuned.build()(x)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_checkpoints_come_back(run):
    folder, _, masked, finetuned = run
    for path, checkpoint in (("masked.pt", masked), ("finetuned.pt", finetuned)):
        found = Checkpoint.load(folder / path)
        assert found.layers == checkpoint.layers
        torch.testing.assert_close(found.build().state_dict(), checkpoint.model, rtol=0, atol=0)


def test_fine_tuning_resumes_where_it_was_undisturbed(run, tiny, tmp_path):
    config = dataclasses.replace(CONFIG, finetune_epochs=2)
    masked = run[2]
    whole = runs.finetune(tmp_path / "a", masked, config, tiny)

    class StoppedError(Exception):
        pass

    def stop_in_second_epoch(items, _length, label, _status=None):
        if label.startswith("epoch 2"):
            raise StoppedError
        return items

    with pytest.raises(StoppedError):
        runs.finetune(tmp_path / "b", masked, config, tiny, stop_in_second_epoch)
    assert Checkpoint.load(tmp_path / "b" / "finetuned.pt").epoch == 1
    resumed = runs.finetune(tmp_path / "b", masked, config, tiny)
    torch.testing.assert_close(resumed.model, whole.model, rtol=0, atol=0)


def test_thresholds_are_on_the_scales_of_the_plain_net(run, tiny, tmp_path):
    sizes = []
    for threshold in (0.0, 0.8, 1.6):
        config = dataclasses.replace(CONFIG, target=None, threshold=threshold)
        sizes.append(count_params(pruning.prune(run[1], config, tmp_path, tiny).build()))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(("kind", "value"), [("macs", 0.4), ("params", 0.5)])
def test_targets_are_met(run, tiny, tmp_path, kind, value):
    config = dataclasses.replace(CONFIG, target=f"{kind}={value}")
    found = pruning.prune(run[1], config, tmp_path, tiny)
    ratio = deployed_ratio(kind, found, load(tmp_path / "pruned.safetensors"))
    assert 0.8 * value < ratio <= value
    sizes = [mask.sum() / len(mask) for mask in found.narrowed.keep.values()]
    assert min(sizes) >= 1 / 8


def test_accuracy_is_a_target_too(tiny, tmp_path):
    config = dataclasses.replace(CONFIG, holdout=0.25, target="accuracy-drop=90", cost="uniform")
    sparse = runs.train(tmp_path, config, tiny)
    found = pruning.prune(sparse, config, tmp_path, tiny)
    assert found.narrowed.removed > 0


def test_a_fine_tuned_net_is_pruned_further(run, tiny, tmp_path):
    finetuned = run[3]
    config = dataclasses.replace(CONFIG, target="params=0.3")
    again = pruning.prune(finetuned, config, tmp_path, tiny)
    assert count_params(again.build()) < count_params(finetuned.build())


def test_what_does_not_apply_is_refused(run, tiny, tmp_path):
    config = dataclasses.replace(CONFIG, target="macs=0.5", importance="loss")
    with pytest.raises(UsageError, match="small_repvgg is no chain of residual blocks"):
        pruning.prune(run[1], config, tmp_path, tiny)
    with pytest.raises(UsageError, match="small_repvgg is no chain of residual blocks"):
        runs.train(tmp_path, config, tiny)
    with pytest.raises(UsageError, match="no residual blocks with channels inside"):
        runs.train(tmp_path, dataclasses.replace(CONFIG, scope="inner"), tiny)


def test_what_does_not_convert_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(ConversionError, match="softmax"):
        runs.train(tmp_path, dataclasses.replace(CONFIG, model="with_softmax"), tiny)
    assert not (tmp_path / "sparse.pt").exists()

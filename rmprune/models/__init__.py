"""Networks by name."""

from rmprune.models.cifar_resnet import ResNet
from rmprune.models.registry import build_model, create_model, model_names

__all__ = ["ResNet", "build_model", "create_model", "model_names"]

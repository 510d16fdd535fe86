"""Networks by name."""

from rmprune.models.cifar_resnet import ResNet
from rmprune.models.registry import create_model, model_names

__all__ = ["ResNet", "create_model", "model_names"]

"""The recipe in all three modes, on folders of images and tiny models of several kinds."""

import sys
import types

import image_classification
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.recipes.test_text_classification import flags

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **SIZES)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}


@pytest.fixture
def options(tmp_path):
    """Return the options that name a folder of dark and of bright images, 20 each."""
    generator = np.random.default_rng(0)
    for name, level in (("dark", 60), ("bright", 180)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(generator.normal(level, 30, (16, 16)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    values = {"train_dir": tmp_path / "images", "output_dir": tmp_path / "output", "learning_rate": 0.005}
    values |= {"num_train_epochs": 5, "use_cpu": True, "report_to": "none", "logging_steps": 5, "save_strategy": "no"}
    values |= {"rho": 0.01, "augmentation": "none", "eigenvalue_samples": 8}
    return {name: str(value) for name, value in values.items()}


def saved(kind, folder):
    """Save a tiny model of two classes and its image processor, as a hub model is laid out."""
    MODELS[kind]().save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return {"model_name_or_path": str(folder)}


@pytest.mark.parametrize("mode", ["trainer", "sam", "xsam"])
def test_learns_in_each_mode(options, tmp_path, mode, capsys):
    metrics = image_classification.main(flags(options | saved("vit", tmp_path / "vit") | {"optimizer_mode": mode}))
    assert metrics["eval_accuracy"] == 1
    assert "xsam/rayleigh_quotient" in capsys.readouterr().out or mode != "xsam"
    loaded = AutoModelForImageClassification.from_pretrained(options["output_dir"])
    assert loaded.config.id2label == {0: "bright", 1: "dark"}


@pytest.mark.parametrize("kind", ["swin", "convnext", "resnet"])
def test_takes_other_models(options, tmp_path, kind):
    more = {"gradient_accumulation_steps": "2", "per_device_train_batch_size": "4"}
    metrics = image_classification.main(flags(options | saved(kind, tmp_path / kind) | more))
    assert metrics["eval_accuracy"] >= 0.75
    assert metrics["top_eigenvalue"] > 0


def test_accumulation_leaves_the_loss_alone(options, tmp_path):
    """One batch of 36, or nine of 4: the first step's loss is the same."""
    model, losses = saved("vit", tmp_path / "vit"), []
    for size, steps in ((36, 1), (4, 9)):
        more = {"per_device_train_batch_size": str(size), "gradient_accumulation_steps": str(steps), "max_steps": "1"}
        losses.append(image_classification.main(flags(options | model | more))["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_augmentation_is_torchvisions_where_installed(monkeypatch, caplog):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    monkeypatch.setitem(sys.modules, "torchvision", None)
    image = Image.new("RGB", (16, 16))
    assert image_classification.augment("crop", processor)(image) is image
    assert "torchvision cannot be imported" in caplog.text

    transforms = types.ModuleType("torchvision.transforms")
    transforms.v2 = types.SimpleNamespace(
        RandomResizedCrop=lambda size, **_: ("crop", size), RandomHorizontalFlip=lambda: "flip", Compose=list
    )
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    assert image_classification.augment("crop", processor) == [("crop", (16, 16))]
    assert image_classification.augment("crop_and_flip", processor) == [("crop", (16, 16)), "flip"]


def test_a_test_split_of_the_hub_without_labels_is_left_out(options, tmp_path, caplog):
    """A folder stands for a data set on the hub, which is laid out in the same way."""
    feature = Features({"image": ImageFeature(), "label": ClassLabel(names=["dark", "bright"])})
    images = [np.full((16, 16), level, np.uint8) for level in (60, 180)] * 10
    (tmp_path / "hub").mkdir()
    for name, labels in (("train", [0, 1] * 10), ("test", [-1] * 20)):
        Dataset.from_dict({"image": images, "label": labels}, feature).to_parquet(tmp_path / "hub" / f"{name}.parquet")
    del options["train_dir"]
    model = saved("vit", tmp_path / "vit")
    metrics = image_classification.main(flags(options | model | {"dataset_name": str(tmp_path / "hub")}))
    assert "eval_accuracy" in metrics
    assert "test_accuracy" not in metrics
    assert "The test split is left out: it has no labels." in caplog.text
    file = {"train_file": str(tmp_path / "hub" / "train.parquet"), "test_file": str(tmp_path / "hub" / "test.parquet")}
    with pytest.raises(ValueError, match=r"'label' has no label in row 1 of .*test\.parquet"):
        image_classification.main(flags(options | file))


def test_the_embedded_default(tmp_path, monkeypatch):
    more = {"output_dir": str(tmp_path), "max_train_samples": "64", "max_eval_samples": "32", "max_steps": "2"}
    more |= {"use_cpu": "true", "report_to": "none", "save_strategy": "no", "eigenvalue_samples": "8"}
    trainers, make = [], image_classification.make_trainer

    def keep(*arguments, **settings):
        trainers.append(make(*arguments, **settings))
        return trainers[0]

    monkeypatch.setattr(image_classification, "make_trainer", keep)
    metrics = image_classification.main(flags(more))
    assert 0 <= metrics["test_accuracy"] <= 1
    assert (len(trainers[0].train_dataset), len(trainers[0].eval_dataset)) == (64, 32)
    sizes = [len(split) for split in image_classification.digits().values()]
    assert sizes == [1437, 360]

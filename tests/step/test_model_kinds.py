"""Kinds of models beyond text and image classification: at rho 0 the stock trainer's weights, above it X-SAM's step."""

import logging

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    CLIPVisionConfig,
    DataCollatorForLanguageModeling,
    DetrConfig,
    DetrForObjectDetection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    YolosConfig,
    YolosForObjectDetection,
    set_seed,
)

from hf_xsam import XSAMConfig, XSAMSeq2SeqTrainer, XSAMTrainer
from tests.helpers import PLAIN, WeightRecorder, examples_of, logs_of, save_tiny_classifier, weights_of

TEXT = {"vocab_size": 40, "max_position_embeddings": 16}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
COUNT = 8
IMAGE_TOKEN = 39


def tokens(length=10, highest=39):
    return torch.randint(5, highest, (COUNT, length))


def masked_language_model(folder):
    save_tiny_classifier(folder / "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    examples = [{"input_ids": row.tolist()} for row in tokens(highest=18)]
    model = BertForMaskedLM(BertConfig(**{**TEXT, "vocab_size": 18}, **LAYERS))
    return model, examples, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)


def token_classification(_):
    labels = torch.where(torch.rand(COUNT, 10) < 0.3, -100, torch.randint(0, 3, (COUNT, 10)))
    model = BertForTokenClassification(BertConfig(num_labels=3, **TEXT, **LAYERS))
    return model, {"input_ids": tokens(), "labels": labels}


def question_answering(_):
    starts = torch.randint(0, 5, (COUNT,))
    batch = {"input_ids": tokens(), "start_positions": starts, "end_positions": starts + 3}
    return BertForQuestionAnswering(BertConfig(**TEXT, **LAYERS)), batch


WAVES = {
    "conv_dim": (8, 8),
    "conv_kernel": (4, 3),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "mask_time_prob": 0.3,
    "mask_time_length": 2,
    "vocab_size": 12,
}


def audio_classification(_):
    batch = {"input_values": torch.randn(COUNT, 120), "labels": torch.randint(0, 2, (COUNT,))}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**WAVES, **LAYERS)), batch


def speech_ctc(_):
    batch = {"input_values": torch.randn(COUNT, 120), "labels": torch.randint(1, 12, (COUNT, 4))}
    config = Wav2Vec2Config(**WAVES, **LAYERS, pad_token_id=0, ctc_zero_infinity=True)
    return Wav2Vec2ForCTC(config), batch


def speech_to_text(_):
    widths = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 10}
    widths |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=40, max_target_positions=16, **widths, **special)
    batch = {"input_features": torch.randn(COUNT, 8, 20), "labels": tokens(6)}
    return WhisperForConditionalGeneration(config), batch


def boxes(_=None):
    """Return examples of images with one to three boxes each, and their collator."""
    examples = []
    for i in range(COUNT):
        found = 1 + i % 3
        corners = torch.rand(found, 2) * 0.5 + 0.25
        labels = {"class_labels": torch.randint(0, 3, (found,)), "boxes": torch.cat([corners, corners / 2], 1)}
        examples.append({"pixel_values": torch.randn(3, 32, 32), "labels": labels})

    def collate(rows):
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": [dict(row["labels"]) for row in rows]}

    return examples, collate


def detection_by_tokens(_):
    pytest.importorskip("PIL", reason="transformers 5.0 needs Pillow for the loss of boxes")
    config = YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=3, **LAYERS)
    return YolosForObjectDetection(config), *boxes()


def detection_by_queries(_):
    pytest.importorskip("PIL", reason="transformers 5.0 needs Pillow for the loss of boxes")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    backbone = ResNetConfig(**sizes, layer_type="basic", out_features=["stage2"])
    widths = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "num_labels": 3}
    widths |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False}
    config = DetrConfig(**own, backbone_config=backbone, auxiliary_loss=True, **widths)
    return DetrForObjectDetection(config), *boxes()


def segmentation(_):
    each = {
        "depths": [1] * 4,
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "mlp_ratios": [2] * 4,
    }
    config = SegformerConfig(**each, sr_ratios=[2, 1, 1, 1], decoder_hidden_size=8, num_labels=3)
    batch = {"pixel_values": torch.randn(COUNT, 3, 32, 32), "labels": torch.randint(0, 3, (COUNT, 32, 32))}
    return SegformerForSemanticSegmentation(config), batch


def summarization(_):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": tokens(), "labels": tokens(6)}


def image_and_text(_):
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **LAYERS)
    text = LlamaConfig(**TEXT, **LAYERS, pad_token_id=0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=4)
    ids = torch.cat([torch.full((COUNT, 4), IMAGE_TOKEN), tokens(6)], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(COUNT, 3, 16, 16)}
    return LlavaForConditionalGeneration(config), {**batch, "labels": ids.where(ids != IMAGE_TOKEN, -100)}


def images_of_any_size(_):
    """Of Qwen2-VL: the patches of all images are in one tensor, and positions have three axes."""
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 16}
    text = {**TEXT, **LAYERS, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_start_token_id=38, video_token_id=37
    )
    examples = []
    for row in tokens(5, highest=36):
        ids = torch.cat([torch.tensor([38, IMAGE_TOKEN]), row])
        examples.append({"input_ids": ids, "patches": torch.randn(4, 3 * 2 * 16), "grid": torch.tensor([[1, 2, 2]])})

    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
            "pixel_values": torch.cat([row["patches"] for row in rows]),
            "image_grid_thw": torch.cat([row["grid"] for row in rows]),
            "labels": ids,
        }

    return Qwen2VLForConditionalGeneration(config), examples, collate


EXACT, DIFFERENCES = "exact", "finite_difference"
KINDS = {
    masked_language_model: EXACT,
    token_classification: EXACT,
    question_answering: EXACT,
    audio_classification: EXACT,
    speech_ctc: DIFFERENCES,  # PyTorch's CTC loss has no second derivative
    speech_to_text: EXACT,
    detection_by_tokens: EXACT,
    detection_by_queries: EXACT,
    segmentation: EXACT,
    summarization: EXACT,
    image_and_text: EXACT,
    images_of_any_size: EXACT,
}
TO_SEQUENCES = (summarization, speech_to_text)
EACH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def train(kind, folder, config=None, **overrides):
    set_seed(0)
    model, data, *collator = kind(folder)
    stock, ours = (Seq2SeqTrainer, XSAMSeq2SeqTrainer) if kind in TO_SEQUENCES else (Trainer, XSAMTrainer)
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    settings |= {"learning_rate": 1e-2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings |= {"use_cpu": True, "remove_unused_columns": False, **overrides}
    recorder = WeightRecorder()
    trainer = (stock if config is None else ours)(
        model=model,
        args=Seq2SeqTrainingArguments(str(folder / "output"), **settings),
        train_dataset=examples_of(data) if isinstance(data, dict) else data,
        data_collator=collator[0] if collator else None,
        callbacks=[recorder],
        **({} if config is None else {"xsam_config": config}),
    )
    trainer.train()
    return trainer, recorder


@EACH
def test_equals_the_stock_trainer(kind, tmp_path):
    stock, _ = train(kind, tmp_path / "stock")
    ours, _ = train(kind, tmp_path / "ours", XSAMConfig(**PLAIN))
    assert torch.equal(weights_of(ours.model), weights_of(stock.model))
    for one, other in zip(ours.model.buffers(), stock.model.buffers(), strict=True):
        assert torch.equal(one, other)
    assert [line["loss"] for line in logs_of(ours)] == [line["loss"] for line in logs_of(stock)]


@EACH
def test_a_step(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_xsam")
    config = XSAMConfig(rho=0.02, eigen_interval=1, log_metrics="all")
    trainer, recorder = train(kind, tmp_path, config, max_steps=1, lr_scheduler_type="constant", max_grad_norm=0.0)
    (log,) = logs_of(trainer)
    assert trainer._xsam_steps.method == KINDS[kind], caplog.text
    assert log["xsam/rayleigh_quotient"] != 0
    assert log["xsam/perturbed_loss"] != log["loss"]
    assert torch.equal(recorder.before[0], recorder.after_gradient[0])
    assert log["xsam/skipped_steps"] == 0
    assert "run again at the same weights" not in caplog.text

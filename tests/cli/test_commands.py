"""`hf-xsam` in a process of its own; `hf-xsam sharpness` on saved models and adapters of each task; their errors."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Gemma3Config,
    Gemma3ForSequenceClassification,
)

from hf_xsam.cli.main import main
from hf_xsam.data.movie_reviews import cached_archive
from hf_xsam.sharpness import MeasureSettings, measure
from tests.helpers import TINY, WORDS, save_tiny_classifier, save_tiny_image_classifier, save_tiny_language_model

FEW = ["--samples", "12", "--batch_size", "5", "--trace_samples", "2", "--slice_points", "3", "--device", "cpu"]
QUIET = ["--progress", "false"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def reviews(tmp_path):
    """A csv file: good words are yes, bad ones no."""
    with (tmp_path / "reviews.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(22):
            words = f"{WORDS[i % 6]} {WORDS[6 + i % 2]} " * (1 + i % 3)
            writer.writerow([words, "yes" if i % 6 < 3 else "no"])
    return str(tmp_path / "reviews.csv")


def run(*words):
    """Run `hf-xsam`, as the script that pip installs runs it."""
    command = [
        sys.executable,
        "-c",
        "import sys; from hf_xsam.cli.main import main; sys.exit(main())",
        *map(str, words),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def measured(model, dataset, *options):
    """Run `hf-xsam sharpness` in this process, and return what it writes."""
    main(["sharpness", str(model), "--dataset", str(dataset), "--overwrite", *FEW, *QUIET, *map(str, options)])
    return json.loads((Path(model) / "sharpness.json").read_text())


def refused(capsys, *words):
    """Return the sentence with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_text_classifier_on_a_file_equals_measure(tmp_path, reviews):
    names = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}  # not in the order of the alphabet
    model = save_tiny_classifier(tmp_path / "model", **names)
    found = measured(tmp_path / "model", reviews, "--top_k", 2, "--samples", 100, "--rhos", "0.02", "0.1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with open(reviews) as file:
        rows = [(tokenizer(row["text"]), int(row["label"] == "no")) for row in csv.DictReader(file)]
    batch = DataCollatorWithPadding(tokenizer)([{**tokens, "labels": label} for tokens, label in rows])
    expected = measure(model, [dict(batch)], MeasureSettings(top_k=2, rhos=[0.02, 0.1]), progress=False)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found["eigenvalues"] == pytest.approx(expected.eigenvalues, rel=1e-3)
    assert found["sam_sharpness"] == pytest.approx(expected.to_dict()["sam_sharpness"], rel=1e-3)
    assert found["model"] == str(tmp_path / "model")
    assert found["settings"]["dataset"] == reviews
    assert found["settings"]["targets"] == 22
    assert found["slices"]["eigenvector"]["distances"] == [-0.5, 0, 0.5]


def test_classes_are_matched_by_name_else_in_order_and_said_so(tmp_path, reviews, capsys):
    losses = {}
    for name, classes in {"same": ("yes", "no"), "case": ("YES", "No"), "other": ("good", "bad")}.items():
        names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
        save_tiny_classifier(tmp_path / name, **names)
        losses[name] = measured(tmp_path / name, reviews)["loss"]
        said = "they are matched in order: no as good, yes as bad." in capsys.readouterr().out
        assert said == (name == "other")
    assert losses["same"] == losses["case"] != losses["other"]


def test_a_classifier_whose_config_names_no_padding_token(tmp_path, reviews):
    """Gemma 3's has one in its text_config alone."""
    save_tiny_classifier(tmp_path / "model")  # for its tokenizer
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"vocab_size": 18, "num_key_value_heads": 1, "head_dim": 8, **sizes}
    vision = {"image_size": 28, "patch_size": 14, **sizes}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, num_labels=2)
    assert not hasattr(config, "pad_token_id")
    Gemma3ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    assert measured(tmp_path / "model", reviews, "--eigen_scope", "score")["settings"]["targets"] == 12


def test_any_split_of_a_folder_of_data(tmp_path, reviews):
    """A folder stands for a data set on the hub, which is described in the same way."""
    data = tmp_path / "data"
    data.mkdir()
    os.rename(reviews, data / "a.csv")
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: a.csv\n---\n"
    )
    save_tiny_classifier(tmp_path / "model")
    settings = measured(tmp_path / "model", data, "--split", "train_sft", "--samples", 100)["settings"]
    assert (settings["split"], settings["samples"]) == ("train_sft", 22)


def test_figures_that_cannot_be_written_are_printed(tmp_path, reviews, capsys):
    save_tiny_classifier(tmp_path / "model")
    file = Path(reviews, "is a file", "s.json")
    words = ["sharpness", tmp_path / "model", "--dataset", reviews, *FEW, *QUIET, "--output_file", file]
    with pytest.raises(SystemExit):
        main(list(map(str, words)))
    said = capsys.readouterr()
    assert "eigenvalue 1" in said.out
    assert "is a file" in said.err


def test_an_image_classifier_on_digits(tmp_path):
    save_tiny_image_classifier(tmp_path, classes=10)
    file = tmp_path / "here" / "s.json"
    options = ["--split", "validation", "--output_file", file]
    result = run("sharpness", tmp_path, "--dataset", "digits", *FEW, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "eigenvalue 1" in result.stdout
    assert f"Written to {file}" in result.stdout
    found = json.loads(file.read_text())
    assert found["settings"]["split"] == "validation"
    assert found["trace"]["samples"] == 2


@pytest.mark.skipif(not cached_archive().exists(), reason="fetched by pip where it is needed")
@pytest.mark.parametrize("options", [[], ["--completion_only_loss", "--top-k", "2"]])
def test_a_language_model_on_movie_text(tmp_path, options):
    save_tiny_language_model(tmp_path)
    found = measured(tmp_path, "movie_text", "--max_length", "24", *options)
    # Prompts are without labels: there are the tokens of " positive" or " negative", and of the end.
    assert (found["settings"]["targets"] == 12 * 2) == bool(options)
    assert len(found["eigenvalues"]) == (2 if options else 1)


def adapter_of(model, folder, base, **settings):
    model.name_or_path = str(base)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return adapted


def test_a_classifiers_adapter(tmp_path, reviews):
    model = save_tiny_classifier(tmp_path / "base")
    adapted = adapter_of(model, tmp_path / "adapter", tmp_path / "base", task_type="SEQ_CLS")
    found = measured(tmp_path / "adapter", reviews, "--eigen_scope", "lora")
    assert found["settings"]["parameters"] == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    everything = measured(tmp_path / "adapter", reviews)
    assert everything["settings"]["parameters"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert everything["loss"] == found["loss"]


def test_an_adapters_base_gets_the_datas_classes(tmp_path):
    """The base model has a head of two classes, the adapter one of three."""
    save_tiny_classifier(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    adapter_of(model, tmp_path / "adapter", tmp_path / "base", task_type="SEQ_CLS")
    features = Features({"text": Dataset.from_dict({"text": [""]}).features["text"], "label": ClassLabel(3)})
    rows = {"text": ["good film", "bad plot", "dull film"] * 4, "label": [0, 1, 2] * 4}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "three.parquet")
    found = measured(tmp_path / "adapter", tmp_path / "three.parquet")
    assert found["settings"]["targets"] == 12


def test_an_adapter_without_a_task_type(tmp_path):
    model = save_tiny_image_classifier(tmp_path / "base", classes=2)
    adapter_of(model, tmp_path / "adapter", tmp_path / "base")
    data = {"image": [torch.full((8, 8), 20 * i).to(torch.uint8).numpy() for i in range(12)], "label": [0, 1] * 6}
    features = Features({"image": Image(), "label": ClassLabel(2)})
    Dataset.from_dict(data, features).to_parquet(tmp_path / "images.parquet")
    found = measured(tmp_path / "adapter", tmp_path / "images.parquet", "--eigen_scope", "lora")
    assert found["settings"]["targets"] == 12


def test_a_language_models_adapter(tmp_path):
    base = save_tiny_language_model(tmp_path / "base")
    adapter_of(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", base, task_type="CAUSAL_LM")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"a {word} film"}) for word in WORDS[:8]))
    found = measured(tmp_path / "adapter", tmp_path / "texts.jsonl", "--hvp", "finite_difference")
    assert found["settings"]["hvp"] == "finite_difference"
    assert found["settings"]["targets"] == 8 * 3


# A template with an opening of the answer, "a :", which ends each message by the end-of-sequence token.
TEMPLATE = (
    "{% for m in messages %}{{ 'a : ' if m.role == 'assistant' else '' }}{{ m.content }} {{ eos_token }} {% endfor %}"
    "{{ 'a :' if add_generation_prompt else '' }}"
)


@pytest.fixture
def chat_model(tmp_path):
    """A folder of a language model whose tokenizer has a chat template."""
    folder = save_tiny_language_model(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def says(role, content):
    return {"role": role, "content": content}


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_chats_go_through_the_chat_template(tmp_path, chat_model):
    asked = [[says("user", f"a {word} film"), says("assistant", f"{word} plot")] for word in WORDS[:6]]
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": messages} for messages in asked])
    found = measured(chat_model, chats)
    # The texts that the template makes of them, without the last end-of-sequence token, which each text gets.
    as_texts = [{"text": f"a {word} film </s> a : {word} plot"} for word in WORDS[:6]]
    expected = measured(chat_model, jsonl(tmp_path / "texts.jsonl", as_texts))
    assert (found["loss"], found["settings"]["targets"]) == (expected["loss"], 6 * 8)
    chats = jsonl(tmp_path / "named.jsonl", [{"text": "a", "talk": messages} for messages in asked])
    assert measured(chat_model, chats, "--text_column", "talk")["loss"] == found["loss"]


def test_the_answers_to_conversational_prompts(tmp_path, chat_model):
    rows = [
        {"prompt": [says("user", f"a {word} film")], "completion": [says("assistant", f"{word} plot")]}
        for word in WORDS[:6]
    ]
    found = measured(chat_model, jsonl(tmp_path / "chats.jsonl", rows), "--completion_only_loss")
    as_texts = [{"prompt": f"a {word} film </s> a :", "completion": f"{word} plot"} for word in WORDS[:6]]
    expected = measured(chat_model, jsonl(tmp_path / "texts.jsonl", as_texts), "--completion_only_loss")
    # Two words and the end of each answer are predicted, and nothing that the template puts before.
    assert (found["loss"], found["settings"]["targets"]) == (expected["loss"], 6 * 3)
    # Cut at the beginning, so that the answers stay.
    cut = measured(chat_model, tmp_path / "chats.jsonl", "--completion_only_loss", "--max_length", "4")
    assert cut["settings"]["targets"] == 6 * 3


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            None,
            {"messages": [says("user", "good")]},
            "'messages' holds messages, and the tokenizer has no chat template",
        ),
        (
            "{{ raise_exception('Roles must alternate.') }}",
            {"messages": [says("user", "good")]},
            "'messages' holds messages that the chat template refuses: Roles must alternate.",
        ),
        (TEMPLATE, {"messages": []}, r"'messages' holds \[\], not messages with a role"),
        (TEMPLATE, {"messages": [{"from": "human"}]}, "'messages' holds .*'human'.*, not messages with a role"),
        (TEMPLATE, {"messages": "good"}, None),
    ],
)
def test_chats_that_do_not_fit_are_named(tmp_path, chat_model, capsys, template, row, message):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = template
    for path in Path(chat_model).glob("chat_template*"):
        path.unlink()
    tokenizer.save_pretrained(chat_model)
    words = ["sharpness", chat_model, "--dataset", jsonl(tmp_path / "d.jsonl", [row] * 3), *FEW, *QUIET]
    if message:
        assert re.search(message, refused(capsys, *words))
    else:  # a column of that name may hold texts
        main(list(map(str, words)))


def test_prompts_and_completions_name_their_option(tmp_path, chat_model, capsys):
    rows = jsonl(tmp_path / "d.jsonl", [{"prompt": "a film", "completion": "good"}] * 3)
    said = refused(capsys, "sharpness", chat_model, "--dataset", rows, *FEW, *QUIET)
    assert "The data has prompts and completions, and no texts: pass completion_only_loss." in said


def test_an_answer_that_is_a_text_is_named(tmp_path, chat_model, capsys):
    rows = jsonl(tmp_path / "d.jsonl", [{"prompt": [says("user", "a film")], "completion": "good"}] * 3)
    words = ["sharpness", chat_model, "--dataset", rows, "--completion_only_loss", *FEW, *QUIET]
    assert "Column 'completion' holds 'good', not messages with a role" in refused(capsys, *words)


def test_an_earlier_measurement_is_kept_unless_asked(tmp_path, reviews, capsys):
    save_tiny_classifier(tmp_path / "model")
    measured(tmp_path / "model", reviews)
    file = tmp_path / "model" / "sharpness.json"
    before = file.read_bytes()
    # Said before the model and the data are looked at, which are not there.
    (tmp_path / "model" / "config.json").unlink()
    for options in ([], ["--output_file", tmp_path / "model"], ["--output_file", file]):
        said = refused(capsys, "sharpness", tmp_path / "model", "--dataset", "nowhere.csv", *options)
        assert f"{file} holds an earlier measurement: replace it with --overwrite, or name another file" in said
    assert file.read_bytes() == before
    said = refused(capsys, "sharpness", tmp_path / "model", "--dataset", reviews, "--overwrite")
    assert "holds no saved model" in said


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert re.search("sharpness +measure how sharp.*\n +plot +draw runs", capsys.readouterr().out)
    for words in (["sharpness", "MODEL", "--dataset DATASET"], ["plot", "RUNS"]):
        with pytest.raises(SystemExit) as ended:
            main([words[0], "--help"])
        assert ended.value.code == 0
        assert f"usage: hf-xsam {' '.join(words)} [--option value ...]" in capsys.readouterr().out
    assert "invalid choice: 'flatness'" in refused(capsys, "flatness")
    assert "required: COMMAND" in refused(capsys)


@pytest.mark.parametrize(
    ("words", "slow"), [(["--help"], {"torch", "transformers"}), (["plot", "--help"], {"torch", "matplotlib"})]
)
def test_help_waits_for_no_import(words, slow):
    code = f"""
import sys
from hf_xsam.cli.main import main
try:
    main({words})
finally:
    print(sorted({slow} & sys.modules.keys()))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    assert said.startswith("usage: hf-xsam")
    assert said.endswith("\n[]\n")


def test_a_mistake_is_a_sentence_and_no_traceback(tmp_path):
    result = run("sharpness", tmp_path / "nowhere", "--dataset", "digits")
    assert result.returncode == 2
    assert "is neither a local folder nor a model that can be loaded from the hub (" in result.stderr
    assert "Traceback" not in result.stderr


def test_models_that_do_not_fit_are_named(tmp_path, reviews, capsys):
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    message = refused(capsys, "sharpness", tmp_path / "run", "--dataset", reviews)
    assert "holds no saved model or adapter. Measure one of its checkpoints: checkpoint-7." in message
    BertForMaskedLM(BertConfig(vocab_size=18, **TINY)).save_pretrained(tmp_path / "masked")
    message = refused(capsys, "sharpness", tmp_path / "masked", "--dataset", reviews)
    assert "is a BertForMaskedLM; it must be a model for text classification" in message
    model = save_tiny_classifier(tmp_path / "base")
    adapter_of(model, tmp_path / "adapter", tmp_path / "base", task_type="SEQ_CLS")
    (tmp_path / "base").rename(tmp_path / "moved")
    message = refused(capsys, "sharpness", tmp_path / "adapter", "--dataset", reviews)
    assert "is an adapter, and its base model is missing" in message
    (tmp_path / "moved" / "model.safetensors").unlink()
    message = refused(capsys, "sharpness", tmp_path / "moved", "--dataset", reviews)
    assert "cannot be loaded: " in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nowhere.csv"], "dataset is 'nowhere.csv', and there is no such file"),
        (["--dataset", "nobody/nothing"], "dataset is 'nobody/nothing', which cannot be loaded"),
        (["--split", "dev"], "split is 'dev'; .* has train"),
        (["--text_column", "body"], r"text_column is 'body'; .*reviews\.csv has text, label"),
        (["--label_column", "mark"], r"label_column is 'mark'; .*reviews\.csv has text, label"),
        (["--label_column", "text"], "label_column 'text' has 6 classes, and the model has 2"),
        (["--device", "abacus"], "device is 'abacus', which torch cannot use"),
        (["--samples", "0"], "samples is 0; it must be at least 1"),
        (["--eigen_scope", "lora"], "eigen_scope is 'lora', which matches no trainable parameter"),
        (["--top_k", "0", "--dataset", "nowhere.csv"], "top_k is 0; it must be at least 1"),
        (["--slice_points", "-1"], "slice_points is -1; it must be at least 0"),
        (["--tolerance", "nan"], "tolerance is nan; it must be a finite number"),
        (["--rhos", "-1"], r"rhos are \[-1\.0\]; they must be above 0"),
        (["--hvp", "guess"], "argument --hvp: invalid choice: 'guess'"),
        (["--top_k", "many"], "argument --top_k/--top-k: invalid int value: 'many'"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, reviews, capsys, options, message):
    save_tiny_classifier(tmp_path / "model")
    data = [] if "--dataset" in options else ["--dataset", reviews]
    assert re.search(message, refused(capsys, "sharpness", tmp_path / "model", *data, *FEW, *QUIET, *options))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["good", "yes"], ["bad", None]], "label_column 'label' has no label in row 2 of"),
        ([["good", "yes"], [None, "no"]], "Column 'text' holds None, not a text, in row 2 of"),
        ([[3, "yes"], [4, "no"]], "Column 'text' holds 3, not a text, in row 1 of"),
    ],
)
def test_rows_without_a_text_or_a_label_are_named(tmp_path, capsys, rows, message):
    texts, labels = zip(*rows, strict=True)
    Dataset.from_dict({"text": texts, "label": labels}).to_parquet(tmp_path / "d.parquet")
    save_tiny_classifier(tmp_path / "model")
    words = ["sharpness", tmp_path / "model", "--dataset", tmp_path / "d.parquet", *FEW, *QUIET]
    assert message in refused(capsys, *words)


def test_paths_of_images_are_named(tmp_path, capsys):
    Dataset.from_dict({"image": ["a.png", "b.png"], "label": [0, 1]}).to_parquet(tmp_path / "d.parquet")
    save_tiny_image_classifier(tmp_path / "model", classes=2)
    words = ["sharpness", tmp_path / "model", "--dataset", tmp_path / "d.parquet", *FEW, *QUIET]
    assert "Column 'image' holds 'a.png', not an image, in row 1 of" in refused(capsys, *words)


def test_a_damaged_tokenizer_is_named(tmp_path, reviews, capsys):
    save_tiny_classifier(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    (tmp_path / "model" / "vocab.txt").unlink()
    said = refused(capsys, "sharpness", tmp_path / "model", "--dataset", reviews, *FEW, *QUIET)
    assert re.search(r"model' has no tokenizer that can be loaded \(.+\): save one into the same folder", said)


def test_packages_that_are_missing_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("sharpness", "data"):
        monkeypatch.delitem(sys.modules, f"hf_xsam.cli.{name}", raising=False)
    assert "pip install 'hf_xsam[tools]'" in refused(capsys, "sharpness", "model", "--dataset", "digits")

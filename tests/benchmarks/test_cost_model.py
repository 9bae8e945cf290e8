"""The cost model's formulas against counted runs, and the tables of the pages on scaling against the code."""

import pytest
import torch
from contenders import TrainerContender, xsam
from cost_formulas import Llama, ddp_traffic, extra_copies, flops, fsdp_collectives, policies, step_flops
from cost_model import tables
from memory import peak_tensor_memory
from pages import filled
from peft import LoraConfig, get_peft_model
from scaling import run
from scaling_run import STEPS, workload
from scaling_sizes import LENGTH, MICRO_BATCH, SIZES
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_xsam import XSAMConfig
from tests.test_distributed import SAM, case, launch

NAMES = {"AdamW": "stock Trainer", "SAM": "SAM", "X-SAM": "X-SAM"}


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 1), (2, 2), (5, 1)])
def test_flops_and_collectives_of_a_run(micro_batches, processes):
    point = {"size": "0.1M", "micro_batches": micro_batches, "processes": processes, "repeats": 1}
    counted, model = run(point)["contenders"], SIZES["0.1M"]
    for policy in policies(exact=True)[:3]:
        figures = counted[NAMES[policy.name]]
        tokens = MICRO_BATCH * LENGTH * micro_batches
        assert figures["flops"] == step_flops(policy, model, tokens, LENGTH, micro_batches)
        traffic = figures["collectives"].get("allreduce", {"count": 0, "bytes": 0})
        expected = ddp_traffic(policy, model.trainable) if processes > 1 else (0, 0)
        assert (traffic["count"], traffic["bytes"]) == pytest.approx(expected)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flops_of_passes(rank, key_heads):
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=key_heads,
        intermediate_size=160, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model, sizes = LlamaForCausalLM(config), Llama(64, 3, 160, 100, 16 * key_heads, lora_rank=rank)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in parameters) == sizes.trainable
    tokens = torch.randint(0, 100, (4, 16))
    with FlopCounterMode(display=False) as gradient:
        loss = model(input_ids=tokens, labels=tokens).loss
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    with FlopCounterMode(display=False) as double:
        torch.autograd.grad(gradients, parameters, [torch.ones_like(part) for part in gradients])
    assert (gradient.get_total_flops(), double.get_total_flops()) == flops(sizes, tokens.numel(), 16)


def test_collectives_of_fsdp2(tmp_path):
    cases = {"AdamW": case(None, 2, strategy="fsdp2"), "SAM": case(SAM, 2, strategy="fsdp2")}
    counted, steps = launch(2, cases, tmp_path)[0], 4
    stock, sam, _, _ = policies(exact=False)
    of_sam, of_stock = (fsdp_collectives(p, counted["SAM"]["units"], micro_batches=2) for p in (sam, stock))
    for kind, more, less in zip(("gathers", "scatters"), of_sam, of_stock, strict=True):
        # Beyond them, either gathers a few numbers: losses to log.
        assert counted["SAM"][kind] - counted["AdamW"][kind] == steps * (more - less)


def test_memory(tmp_path):
    small = workload("4M", 1)
    small.batch_size, small.dataset = 1, [{name: row[:8] for name, row in example.items()} for example in small.dataset]

    def peak(make):
        return peak_tensor_memory(TrainerContender(make, small, str(tmp_path), STEPS).block)

    stock, size = peak(Trainer), 4 * SIZES["4M"].trainable
    for exact, hvp in ((True, "exact"), (False, "finite_difference")):
        _, sam, policy, _ = policies(exact)
        copies = (peak(xsam(XSAMConfig(rho=0.01, hvp=hvp))) - stock) / size
        assert copies == pytest.approx(max(extra_copies(policy)), abs=0.4)
    copies = (peak(xsam(XSAMConfig(rho=0.01, alpha=0.0))) - stock) / size
    assert copies == pytest.approx(max(extra_copies(sam)), abs=0.4)


def test_the_pages_have_the_tables_that_the_code_makes():
    for page, parts in tables().items():
        assert filled(page, parts) == page.read_text(encoding="utf-8")

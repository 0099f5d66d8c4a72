"""Writes a tiny Hugging Face folder of a model family, and what the model computes.

families.py has the families; this file is the same for all of them.

A folder NAME of trainer/tests/golden/families has:
  model/                 what transformers' save_pretrained writes, for most families unchanged
  outputs.safetensors    input_ids, logits, loss, grad_norm, and router_ids.L for every MoE layer L:
                         the experts of each token, ascending
  gradients.safetensors  gradients of the cross-entropy loss alone, by the keys of `model`.
                         Frozen biases have none.
  after.safetensors      weights after 3 steps of clip_grad_norm_(1.0) and AdamW on the same batch,
                         but for those that rounding decides
Gradients and weights after training have no quantised keys: they are those of the plain folder.
"""

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
# Names of frozen biases that change the choice of experts.
CHOICE_BIAS = ("e_score_correction_bias", "expert_bias")
# Smallest difference of scores at the boundary of a choice.
MARGIN = 1e-6
MAX_BYTES = 170_000


def unchanged(value):
    """Returns its argument."""
    return value


@dataclass
class Family:
    """A tiny model, and how its folder differs from what save_pretrained writes."""

    config: object
    # Largest shard in bytes. The default is one file.
    shard: int | None = None
    # Changes the drawn parameters of the module, in place.
    adjust: Callable = lambda module: None
    # Returns tensors by the keys of the released folder, from tensors by those of transformers.
    release: Callable = unchanged
    # Returns config.json of the released folder, from that of transformers.
    release_config: Callable = unchanged
    # Returns the stored tensors of one key, and the values that a reader gets from them.
    quantize: Callable | None = None
    # Returns tensors that the model does not use, from the model's.
    extra: Callable = lambda tensors: {}
    # Text files to add, by name.
    files: dict = field(default_factory=dict)
    # Adds files to the finished folder, and those next to it.
    finish: Callable = lambda folder: None
    # Changes to config.json with which transformers loads the folder. None if it cannot.
    reload: dict | None = field(default_factory=dict)
    # Ends of names whose gradients are only rounding errors, at least in part. They are not among
    # the weights after training.
    undetermined: tuple = ()
    seed: int = 0


class Margin(TorchFunctionMode):
    """Fails if scores on both sides of a top-k boundary are almost equal."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.topk, torch.Tensor.topk):
            scores, chosen = args[0].detach(), result[0].shape[-1]
            if scores.shape[-1] > chosen:
                ordered = scores.sort(descending=True).values
                gap = (ordered[..., chosen - 1] - ordered[..., chosen]).min().item()
                assert gap > MARGIN, f"scores of a choice are {gap} apart: take another seed"
        return result


@contextmanager
def router_ids(model):
    """Collects the experts of each token by layer, while the model runs."""
    ids, hooks = {}, []
    for name, module in model.named_modules():
        found = re.fullmatch(r"model\.layers\.(\d+)\..*\.experts", name)
        if found:

            def record(module, args, layer=found[1]):
                ids[f"router_ids.{layer}"] = args[1].detach().sort(dim=-1).values.contiguous()

            hooks.append(module.register_forward_pre_hook(record))
    yield ids
    for hook in hooks:
        hook.remove()


def draw(model):
    """Draws parameters so that a tensor that is missing or misplaced shows in the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.25)
        elif parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.25)


def read(folder):
    """Returns the tensors of all safetensors files in a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def saved(model):
    """Returns the tensors that save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read(Path(folder))


def loaded(folder):
    """Returns the model of a folder as transformers loads it, without missing tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model


def gradients(model):
    """Returns gradients by the keys that save_pretrained writes."""
    # NaN marks what has none.
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, twin in zip(model.parameters(), carrier.parameters(), strict=True):
            twin.copy_(torch.nan if parameter.grad is None else parameter.grad)
        for buffer in carrier.buffers():
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
    tensors = {}
    for name, tensor in saved(carrier).items():
        missing = tensor.isnan()
        assert missing.all() or not missing.any(), name
        if not missing.any():
            assert tensor.any(), f"{name} has no effect: take another seed"
            tensors[name] = tensor
    return tensors


def check_choices(model, ids):
    """Fails unless frozen biases and groups of experts change which experts a token gets."""
    with_biases = copy.deepcopy(model)
    state = [*with_biases.named_parameters(), *with_biases.named_buffers()]
    biases = [bias for name, bias in state if name.endswith(CHOICE_BIAS)]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    with_groups = copy.deepcopy(model)
    grouped = [m for m in with_groups.modules() if (getattr(m, "num_group", 1) or 1) > 1]
    for module in grouped:
        module.num_group = module.topk_group = 1
    with router_ids(model) as expected:
        model(input_ids=ids)
    for twin, changed in ((with_biases, biases), (with_groups, grouped)):
        if changed:
            with router_ids(twin) as chosen:
                twin(input_ids=ids)
            layer = min(expected)
            assert not torch.equal(expected[layer], chosen[layer]), "the same experts are chosen"


def decays(name, parameter):
    """Returns true for matrices. Biases of experts are matrices in transformers."""
    return parameter.dim() > 1 and not name.endswith("bias")


def train(model, ids):
    """Trains a model in place. Yields the result of each forward pass and the gradients' norm.

    Gradients are there until the caller continues.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained.items() if decays(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in trained.items() if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for _ in range(3):
        optimizer.zero_grad()
        result = model(input_ids=ids, labels=ids)
        result.loss.backward()
        yield result
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()


def check_rounding(before, ids, after):
    """Fails if rounding decides a weight after training: it differs from that of fp64.

    Adam moves a weight as far for a gradient of rounding errors as for any other.
    """
    model = copy.deepcopy(before).double()
    model.set_experts_implementation("eager")
    for _ in train(model, ids):
        pass
    for name, exact in saved(model).items():
        if name in after:
            error = (after[name] - exact).abs().max() / exact.abs().max()
            assert error < 2e-4, f"{name} depends on rounding by {error}: take another seed"


def references(family, model):
    """Trains a model and returns its outputs, gradients and trained weights."""
    before = copy.deepcopy(model)
    ids = torch.randint(0, model.config.vocab_size, (3, 16))
    check_choices(model, ids)
    outputs = {"input_ids": ids}
    with Margin(), router_ids(model) as chosen:
        for step, result in enumerate(train(model, ids)):
            if step == 0:
                outputs["logits"] = result.logits.detach().clone()
                outputs["loss"] = result.loss.detach().reshape(1)
                outputs.update(chosen)
                grad = gradients(model)
                norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
                outputs["grad_norm"] = torch.stack(norms).norm().reshape(1)
    after = saved(model)
    after = {n: t for n, t in after.items() if not n.endswith(family.undetermined)}
    check_rounding(before, ids, after)
    return outputs, grad, after


def write(path, tensors):
    """Writes a safetensors file as save_pretrained does."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def quantize(family, folder):
    """Quantises a folder of transformers. Returns the model of the values that a reader gets."""
    stored, values = {}, {}
    for name, tensor in read(folder).items():
        parts = family.quantize(name, tensor)
        if parts is None:
            stored[name] = values[name] = tensor
        else:
            tensors, values[name] = parts
            stored.update(tensors)
    write(folder / "model.safetensors", values)
    model = loaded(folder)
    write(folder / "model.safetensors", stored)
    return model


def edit_config(folder, edit):
    """Rewrites config.json if `edit` changes it."""
    path = folder / "config.json"
    before = json.loads(path.read_text())
    after = edit(copy.deepcopy(before))
    if after != before or list(after) != list(before):
        path.write_text(json.dumps(after, indent=2) + "\n")


def check_reload(family, folder, ids, logits):
    """Fails unless transformers computes the same logits from the finished folder."""
    if family.reload is None:
        return
    with tempfile.TemporaryDirectory() as temporary:
        twin = Path(temporary) / "model"
        shutil.copytree(folder, twin)
        if family.reload:
            edit_config(twin, lambda config: {**config, **family.reload})
        difference = (loaded(twin)(input_ids=ids).logits - logits).abs().max().item()
    assert difference < 1e-6, f"logits differ by {difference} after loading"


def write_family(name, family, parent):
    """Writes the folder of one family, and prints its size."""
    torch.manual_seed(family.seed)
    target = parent / name
    shutil.rmtree(target, ignore_errors=True)
    folder = target / "model"
    model = AutoModelForCausalLM.from_config(
        family.config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        draw(model)
        family.adjust(model)
    model.save_pretrained(folder, **({"max_shard_size": family.shard} if family.shard else {}))
    if family.quantize:
        model = quantize(family, folder)
    outputs, grad, after = references(family, model)
    weights = read(folder)
    released = family.release(weights)
    released.update(family.extra(released))
    if released.keys() != weights.keys() or any(released[n] is not weights[n] for n in weights):
        assert not family.shard, "only folders of transformers are in shards"
        write(folder / "model.safetensors", released)
    edit_config(folder, family.release_config)
    for file, text in family.files.items():
        (folder / file).write_text(text)
    check_reload(family, folder, outputs["input_ids"], outputs["logits"])
    write(target / "outputs.safetensors", outputs)
    write(target / "gradients.safetensors", family.release(grad))
    write(target / "after.safetensors", family.release(after))
    family.finish(folder)
    files = [path for path in target.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in files)
    shards = len(list(folder.glob("*.safetensors")))
    loss = outputs["loss"].item()
    print(f"{name}: {len(released)} tensors, {shards} files, {size // 1000} KB, loss {loss:.6f}")
    assert size < MAX_BYTES, f"{size} bytes are too many: choose smaller sizes"

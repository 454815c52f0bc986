"""Checkpoints become what others open: ComfyUI's names and float8, LoRA in both namings, model cards, refusals. That a
checkpoint of each launch file is read rightly is proven in the recipes' strategies."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel
from diffusers.loaders import lora_conversion_utils
from helpers import ROOT, assert_equal_weights, run_command, weights
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.export import export, parse_size
from common.model import single_file
from common.record import integrity

SETTINGS = {"pretrained_model_name_or_path": "org/base", "train_data_dir": "/secret/pictures", "train_batch_size": 4}
LORA = {**SETTINGS, "lora_rank": 2, "lora_alpha": 6}
SIZES = dict(num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48)
INPUTS = dict(timestep=torch.tensor([0.5]), guidance=None, return_dict=False)


def qwenimage(**more: object) -> tuple[QwenImageTransformer2DModel, dict]:
    """A small random model with bf16 values, and inputs for it."""
    torch.manual_seed(1)
    model = QwenImageTransformer2DModel(**SIZES, axes_dims_rope=(8, 12, 12), **more)
    inputs = dict(hidden_states=torch.randn(1, 16, 64), encoder_hidden_states=torch.randn(1, 5, 48))
    return rounded(model), {**inputs, "img_shapes": [[(1, 4, 4)]], "encoder_hidden_states_mask": None, **INPUTS}


def flux2(**more: object) -> tuple[Flux2Transformer2DModel, dict]:
    torch.manual_seed(2)
    model = Flux2Transformer2DModel(**SIZES, num_single_layers=2, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    inputs = dict(hidden_states=torch.randn(1, 16, 128), encoder_hidden_states=torch.randn(1, 5, 48))
    ids = dict(img_ids=torch.randint(0, 4, (1, 16, 4)), txt_ids=torch.randint(0, 4, (1, 5, 4)))
    return rounded(model), {**inputs, **ids, **INPUTS}


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    return model.to(torch.bfloat16).float().eval()


MODELS = {"qwenimage_fulltune": qwenimage, "qwenimage_edit": qwenimage, "flux2klein_fulltune": flux2}
each_model = pytest.mark.parametrize("recipe", MODELS)


def checkpoint_of(
    model: torch.nn.Module, folder: Path, recipe: str, settings: dict = SETTINGS, **state: object
) -> Path:
    """A checkpoint as a run of one process leaves it: of all weights, or of those that train."""
    folder = folder / "checkpoint-7"
    (folder / "model").mkdir(parents=True)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "model/diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(model.to_json_string())
    described = {"step": 7, "strategy": "single", "recipe": recipe, "config": settings, **state}
    (folder / "trainer_state.json").write_text(json.dumps(described))
    integrity.seal(folder)
    return folder


# ---- ComfyUI's single file


@each_model
def test_comfyui_file_is_read_by_diffusers_loader(recipe, tmp_path):
    """Catches a name that ComfyUI does not know, rows in another order, halves that are not swapped, a lost tensor:
    diffusers' own reader of such files gives the same weights."""
    model, inputs = MODELS[recipe]()
    export(checkpoint_of(model, tmp_path, recipe), tmp_path / "out", layout="comfyui")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    model.save_config(tmp_path / "config")
    opened = type(model).from_single_file(str(file), config=str(tmp_path / "config"), torch_dtype=torch.float32)
    assert_equal_weights(dict(opened.named_parameters()), dict(model.named_parameters()))
    assert torch.equal(opened(**inputs)[0], model(**inputs)[0])


def test_comfyui_names_of_flux2(tmp_path):
    """Catches a table that diffusers' reader forgives and ComfyUI does not."""
    export(checkpoint_of(flux2()[0], tmp_path, "flux2klein_fulltune"), tmp_path / "out", layout="comfyui")
    names = set(load_file(tmp_path / "out/out.safetensors"))
    assert {re.sub(r"\.1\.", ".N.", name, count=1) for name in names if "_blocks.1." in name} == {
        *(f"double_blocks.N.{part}_attn.{name}" for part in ("img", "txt") for name in ("qkv.weight", "proj.weight")),
        *(f"double_blocks.N.{part}_attn.norm.{n}_norm.scale" for part in ("img", "txt") for n in ("query", "key")),
        *(f"double_blocks.N.{part}_mlp.{number}.weight" for part in ("img", "txt") for number in (0, 2)),
        *(f"single_blocks.N.{name}" for name in ("linear1.weight", "linear2.weight")),
        *(f"single_blocks.N.norm.{name}_norm.scale" for name in ("query", "key")),
    }
    assert {"img_in.weight", "time_in.in_layer.weight", "final_layer.adaLN_modulation.1.weight"} <= names


def test_comfyui_is_told_of_zero_cond_t(tmp_path):
    """Catches a model of 2511 that ComfyUI takes for an older one."""
    for zero_cond_t in (True, False):
        checkpoint = checkpoint_of(
            qwenimage(zero_cond_t=zero_cond_t)[0], tmp_path / str(zero_cond_t), "qwenimage_edit"
        )
        export(checkpoint, tmp_path / str(zero_cond_t) / "out", layout="comfyui")
        names = load_file(tmp_path / str(zero_cond_t) / "out/out.safetensors")
        assert ("__index_timestep_zero__" in names) == zero_cond_t


@each_model
def test_float8(recipe, tmp_path):
    """Catches a scale that is left out, inverted or of another layer, norms and ends in float8, and a file that
    ComfyUI does not take for a scaled one."""
    model, _ = MODELS[recipe]()
    checkpoint = checkpoint_of(model, tmp_path, recipe)
    export(checkpoint, tmp_path / "plain", layout="comfyui")
    export(checkpoint, tmp_path / "small", layout="comfyui", dtype="float8")
    plain, small = (load_file(tmp_path / name / f"{name}.safetensors") for name in ("plain", "small"))
    with safe_open(tmp_path / "small/small.safetensors", "pt") as opened:
        layers = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
    matrices = {name for name, tensor in plain.items() if tensor.ndim == 2 and "blocks." in name}
    assert {f"{layer}.weight" for layer in layers} == matrices and len(matrices) > 10
    assert set(small) == set(plain) | {f"{name}_scale" for name in matrices}
    for name, tensor in plain.items():
        if name not in matrices:
            assert torch.equal(small[name], tensor), name
            continue
        assert small[name].dtype == torch.float8_e4m3fn and small[f"{name}_scale"].dtype == torch.float32
        back = small[name].float() * small[f"{name}_scale"]
        largest = tensor.float().abs().max()
        assert ((back - tensor.float()).abs() <= tensor.float().abs() / 16 + largest * 2**-17).all(), name
        assert small[name].float().abs().max() == 448  # the whole range is used


# ---- LoRA


def with_lora(model: torch.nn.Module, settings: dict = LORA) -> torch.nn.Module:
    scaled = settings.get("use_rslora", False)
    parts = r"to_[qk]|to_out\.0|add_q_proj|to_add_out|to_qkv_mlp_proj"  # one of the three that ComfyUI fuses has none
    targets = rf".*\.attn\.({parts})|single_transformer_blocks\.\d\.attn\.to_out"
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, use_rslora=scaled, target_modules=targets))
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


@each_model
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_is_loaded_by_diffusers(recipe, use_rslora, tmp_path):
    """Catches adapters under wrong names, or with another scale than they were trained with."""
    model, inputs = MODELS[recipe]()
    settings = {**LORA, "use_rslora": use_rslora}
    checkpoint = checkpoint_of(with_lora(model, settings), tmp_path, recipe, settings)
    export(checkpoint, tmp_path / "out")
    bare, _ = MODELS[recipe]()
    plain = bare(**inputs)[0]
    bare.load_lora_adapter(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    assert bare.peft_config["default_0"].use_rslora == use_rslora
    drawn = bare(**inputs)[0]
    assert torch.allclose(drawn, model(**inputs)[0], atol=1e-5) and not torch.allclose(drawn, plain, atol=1e-2)


def change_of(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """{layer: what its adapter adds to the weight}, without layers whose adapter adds nothing."""
    layers = {name.split(".lora_A")[0] for name in tensors if ".lora_A" in name}
    found = {}
    for layer in layers:
        down, up = (tensors[next(n for n in tensors if n.startswith(f"{layer}.lora_{x}."))].float() for x in "AB")
        found[layer.removeprefix("transformer.")] = scale * up @ down
    return {layer: change for layer, change in found.items() if change.abs().max() > 0}


CONVERTERS = {
    qwenimage: "_convert_non_diffusers_qwen_lora_to_diffusers",
    flux2: "_convert_non_diffusers_flux2_lora_to_diffusers",
}


@each_model
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_in_comfyuis_names(recipe, use_rslora, tmp_path):
    """Catches adapters whose names ComfyUI does not know or whose scale is lost, and fused layers that mix up theirs:
    what each adds to its weight is the same."""
    model, _ = MODELS[recipe]()
    settings = {**LORA, "use_rslora": use_rslora}
    checkpoint = checkpoint_of(with_lora(model, settings), tmp_path, recipe, settings)
    export(checkpoint, tmp_path / "out", layout="comfyui")
    tensors = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert all(re.fullmatch(r"diffusion_model\..*\.lora_[AB]\.weight", name) for name in tensors)
    read = getattr(lora_conversion_utils, CONVERTERS[MODELS[recipe]])(dict(tensors))
    ours = change_of(read, 1.0)
    theirs = change_of(dict(model.named_parameters()), 6 / (2**0.5 if use_rslora else 2))
    assert ours.keys() == theirs.keys() and len(theirs) >= 10
    assert all(torch.allclose(ours[layer], change, rtol=0.02, atol=2e-3) for layer, change in theirs.items())


def test_a_frozen_base_is_filled_in(tmp_path):
    """Catches an export of what trains alone, where the rest was frozen."""
    model, _ = qwenimage()
    model.save_pretrained(tmp_path / "base")
    for name, p in model.named_parameters():
        p.requires_grad_(".attn." in name)
        p.data += 1 if p.requires_grad else 0
    settings = {**SETTINGS, "transformer_path": str(tmp_path / "base")}
    export(checkpoint_of(model, tmp_path, "qwenimage_edit", settings, frozen=True), tmp_path / "out")
    exported = {name: p.bfloat16() for name, p in model.named_parameters()}
    assert_equal_weights(weights(tmp_path / "out"), exported)


# ---- model cards


def test_the_card_says_what_it_is(tmp_path):
    """Catches a card that the hub refuses, that names this machine's folders, or whose lines are no Python."""
    settings = {**SETTINGS, "output_dir": str(tmp_path / "my_run"), "learning_rate": 1e-5}
    (tmp_path / "my_run").mkdir()
    rows = [{"step": step, "loss": loss} for step, loss in ((6, 0.5), (7, 0.25), (8, 0.125))]
    (tmp_path / "my_run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, model, more in (("full", qwenimage()[0], {}), ("lora", with_lora(qwenimage()[0]), LORA)):
        checkpoint = checkpoint_of(model, tmp_path / name, "qwenimage_fulltune", {**more, **settings})
        export(checkpoint, tmp_path / name / "out")
        text = (tmp_path / name / "out/README.md").read_text()
        head = yaml.safe_load(text.split("---")[1])
        assert head == {"base_model": "org/base", "library_name": "diffusers"}
        assert str(tmp_path) not in text and "/secret" not in text and "pictures" in text
        assert "step 7" in text and "0.25" in text and "0.125" not in text and "learning_rate" in text
        code = text.split("```python\n")[1].split("```")[0]
        assert len(ast.parse(code).body) == 5 and "org/base" in code  # two imports and three lines
        assert ("load_lora_weights" in code) == (name == "lora")


# ---- what cannot be


def test_refusals(tmp_path):
    """Catches a wrong export that says nothing: one sentence with the way out."""
    checkpoint = checkpoint_of(flux2()[0], tmp_path, "flux2klein_fulltune")
    with pytest.raises(ValueError, match="float8 is for --layout comfyui"):
        export(checkpoint, tmp_path / "out", dtype="float8")
    with pytest.raises(ValueError, match=r"ComfyUI's names of this model are not known; use --layout diffusers"):
        export(checkpoint_of(flux2()[0], tmp_path / "other", "none_such"), tmp_path / "out", layout="comfyui")
    with pytest.raises(ValueError, match=r"no name for transformer_blocks.0.*; add 'transformer_blocks.\{\}"):
        single_file.comfyui_names({"names": {"a": ["b"]}}, ["transformer_blocks.0.attn.to_q.weight"])
    export(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds diffusion_pytorch_model.safetensors already; give a new folder"):
        export(checkpoint, tmp_path / "out")
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint: config.json is missing"):
        export(checkpoint, tmp_path / "again")
    integrity.seal(checkpoint)
    with pytest.raises(ValueError, match=r"no config.json of a transformer.*best/, final/ or export/"):
        export(checkpoint, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_average_without_names_is_refused(tmp_path):
    """Catches averages of an older version that are put under wrong names."""
    model, _ = flux2()
    checkpoint = checkpoint_of(model, tmp_path, "flux2klein_fulltune")
    torch.save([p.detach() for p in model.parameters()], checkpoint / "ema_rank0.pt")
    with pytest.raises(ValueError, match=r"without their names.*--weights last"):
        export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out", weights="last")
    assert weights(tmp_path / "out")


def test_command(tmp_path):
    """Catches flags that do not reach the export, DeepSpeed's old name for it among them, and a mistake that ends in a
    traceback."""
    checkpoint = checkpoint_of(qwenimage()[0], tmp_path, "qwenimage_fulltune")
    command = ["python", ROOT / "common/export.py", checkpoint]
    run_command([*command, tmp_path / "small", "--layout", "comfyui", "--dtype", "float8"]).check()
    assert (tmp_path / "small/small.safetensors").is_file()
    old = ["python", "-m", "common.zero_to_bf16", checkpoint, tmp_path / "old", "--max_shard_size", "100KB"]
    run_command([*old, "--no-safe_serialization"], PYTHONPATH=str(ROOT)).check()
    binary = torch.load(tmp_path / "old/diffusion_pytorch_model.bin")
    run_command([*old[:4], tmp_path / "shards", *old[5:]], PYTHONPATH=str(ROOT)).check()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_equal_weights(binary, weights(tmp_path / "shards"))
    failed = run_command([*command, tmp_path / "small"])
    assert failed.returncode == 2 and "Traceback" not in failed.output and "already" in failed.output


@pytest.mark.parametrize("text, size", [("80GB", 80 * 10**9), ("1.5MB", 1500000), ("7", 7)])
def test_sizes(text, size):
    """Catches units of 1024."""
    assert parse_size(text) == size
    with pytest.raises(ValueError, match="is no size; expected for example 5GB"):
        parse_size(f"{text} apples")

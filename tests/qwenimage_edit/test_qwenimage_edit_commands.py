"""Commands of VideoX-Fun: its launch lines start train.py from any folder, its flags mean what they say, and with
--videox_fun_meanings what they mean there."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from helpers import column, run_command, run_main, weights
from PIL import Image

from common import rules
from common.data.manifest import Record
from common.data.order import MicroBatchSampler
from common.start.config import parse_recipe

LAUNCH_LINES = {
    "single": "--mixed_precision=bf16",  # as many processes as there are GPUs: on a CPU one
    "zero2": """--mixed_precision=bf16 --use_deepspeed --deepspeed_config_file config/zero_stage2_config.json
    --deepspeed_multinode_launcher standard""",
    "zero3": """--zero_stage 3 --zero3_save_16bit_model true --zero3_init_flag true --use_deepspeed
    --deepspeed_config_file config/zero_stage3_config.json --deepspeed_multinode_launcher standard""",
    "fsdp2": """--mixed_precision=bf16 --use_fsdp --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP
    --fsdp_transformer_layer_cls_to_wrap=QwenImageTransformerBlock --fsdp_sharding_strategy FULL_SHARD
    --fsdp_state_dict_type=SHARDED_STATE_DICT --fsdp_backward_prefetch BACKWARD_PRE
    --fsdp_cpu_ram_efficient_loading False""",
}
PUBLISHED = """--train_batch_size=1 --image_sample_size=256 --gradient_accumulation_steps=1 --dataloader_num_workers=1
--num_train_epochs=100 --checkpointing_steps=50 --learning_rate=2e-05 --lr_scheduler=constant_with_warmup
--lr_warmup_steps=100 --seed=42 --gradient_checkpointing --mixed_precision=bf16 --adam_weight_decay=3e-2
--adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 --enable_bucket --uniform_sampling
--trainable_modules . --train_mode qwen_image_edit"""
OWN_FILE = {  # as VideoX-Fun's config has it: a micro-batch of its own, bf16 on, the rest left to accelerate
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 1,
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 5e8, "sub_group_size": 1e9},
}
LORA = """--rank=4 --network_alpha=2 --use_peft_lora
--target_name=to_q,to_k,to_v,img_mod.1,txt_mod.1,img_mlp.0,img_mlp.2,txt_mlp.0,txt_mlp.2"""
SKIPPED = "--low_vram --allow_tf32 --logging_dir logs --enable_text_encoder_in_dataloader --use_peft_lora --save_state"


# ---- launch lines


@pytest.fixture(scope="module")
def published(recipe, model_folder, data_folder, tmp_path_factory):
    """published(strategy, out, more): a launch line for two steps, with two processes where there can be; its
    output."""
    cache = tmp_path_factory.mktemp("published")

    def run(strategy: str, out: Path, *more: object) -> str:
        processes = ["--num_processes", 2, "--num_machines", 1, "--main_process_port", 0]
        argv = [*PUBLISHED.split(), f"--pretrained_model_name_or_path={model_folder}", f"--output_dir={out}"]
        argv += [f"--train_data_dir={data_folder}", f"--train_data_meta={data_folder}/one_source.json"]
        argv += [f"--cache_dir={cache}", "--validation_steps=0", "--max_train_steps=2", *more]  # for the sake of time
        line = LAUNCH_LINES.get(strategy, strategy).split()
        command = [sys.executable, "-m", "accelerate.commands.launch", *processes, *line, recipe / "train.py", *argv]
        return run_command(command).check().output

    return run


@pytest.fixture(scope="module")
def losses_of_two() -> dict[str, list[float]]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", LAUNCH_LINES)
def test_launch_lines_start_their_strategy(published, recipe, losses_of_two, tmp_path, strategy):
    """Catches a published line that needs more than the script's path changed (DeepSpeed's files are those of the
    recipe, wherever the command is called), that starts another strategy, or leaves each process to train alone: two
    processes have the same losses with all of them."""
    published(strategy, tmp_path / "out", "--checkpointing_steps=2")
    assert json.loads((tmp_path / "out/environment.json").read_text())["launch"] == strategy
    losses = column(tmp_path / "out")
    assert list(losses) == [1, 2]
    if strategy != "single":
        assert list(losses.values()) == pytest.approx(
            losses_of_two.setdefault("first", list(losses.values())), rel=0.02
        )
    assert (tmp_path / "out/export/transformer/config.json").is_file()
    if strategy == "zero3":
        script = recipe / "scripts/zero_to_bf16.py"
        flags = [tmp_path / "out/checkpoint-2", tmp_path / "bf16", "--max_shard_size", "80GB", "--safe_serialization"]
        run_command([sys.executable, script, *flags]).check()
        ours, theirs = weights(tmp_path / "bf16"), weights(tmp_path / "out/export/transformer")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_deepspeed_file_of_ones_own(published, tmp_path):
    """Catches a file beside the recipe that is not found, or wins over the run's settings."""
    (tmp_path / "mine.json").write_text(json.dumps(OWN_FILE))
    line = f"--use_deepspeed --deepspeed_config_file {tmp_path}/mine.json --deepspeed_multinode_launcher standard"
    published(line, tmp_path / "out")
    assert json.loads((tmp_path / "out/environment.json").read_text())["launch"] == "zero3"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero2", "fsdp2"])
def test_a_lora_line(published, model_folder, tmp_path, strategy):
    """Catches the LoRA script's flags refused, adapters on other layers than those that are named, and a file that a
    pipeline does not load."""
    output = published(strategy, tmp_path / "out", *LORA.split())
    assert "--use_peft_lora is skipped: adapters are always peft's" in output
    assert "lora_layers: no linear layer is called img_mlp.0, img_mlp.2, txt_mlp.0, txt_mlp.2, there are" in output
    pipeline = QwenImageEditPlusPipeline.from_pretrained(model_folder)
    pipeline.load_lora_weights(tmp_path / "out/export/lora")
    adapted = {name for name, module in pipeline.transformer.named_modules() if hasattr(module, "lora_A")}
    layers = [f"attn.to_{name}" for name in "qkv"] + ["img_mod.1", "txt_mod.1"]
    assert adapted == {f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in layers}
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 2


def test_deepspeed_files_are_the_launch_files_own(recipe):
    """Catches the copy under VideoX-Fun's name that was left behind when the other was changed."""
    for stage in (2, 3):
        copy, own = (
            recipe / name for name in (f"config/zero_stage{stage}_config.json", f"deepspeed/zero{stage}.json")
        )
        assert copy.read_text() == own.read_text()


# ---- flags


def parsed(train, argv: list[object]):
    """What train.py reads."""
    names = train.from_videox_fun
    return parse_recipe(train.Config, [str(word) for word in argv], names.SECOND_NAMES, names.SKIPPED)


def test_flags_that_are_skipped_or_named_otherwise(train, capfd):
    """Catches a flag of VideoX-Fun that ends the run, or swallows the one after it."""
    argv = ["--train_data_dir", "/", *SKIPPED.split(), *LORA.split(), "--lora_skip_name", "img_mod", "--use_ema"]
    cfg = parsed(train, [*argv, "--report_to", "all", "--lr_scheduler", "cosine_with_restarts"])
    said = capfd.readouterr().err
    assert all(f"{word} is skipped: " in said for word in SKIPPED.split() if word.startswith("--"))
    assert (cfg.lora.lora_rank, cfg.lora.lora_alpha, cfg.tuning.ema_decay) == (4, 2, 0.9999)
    assert (cfg.lora.lora_layers[-1], cfg.lora.lora_skip_layers) == ("txt_mlp.2", ("img_mod",))
    assert (cfg.run.report_to, cfg.optim.lr_scheduler) == ("all", "cosine_with_restarts")
    assert parsed(train, [*argv, "--ema_decay", 0.9]).tuning.ema_decay == 0.9


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("none", ("uniform", "none")),
        ("logit_normal", ("logit_normal", "none")),
        ("mode", ("mode", "none")),
        ("sigma_sqrt", ("uniform", "sigma_sqrt")),
        ("cosmap", ("uniform", "cosmap")),
    ],
)
def test_weighting_schemes(settings, scheme, expected):
    """Catches a scheme that draws sigma, or weighs the error, in another way than VideoX-Fun's."""
    flow = settings(weighting_scheme=scheme).flow
    assert (flow.timestep_sampling, flow.loss_weighting) == expected
    again = settings(weighting_scheme=scheme, timestep_sampling=expected[0], loss_weighting=expected[1]).flow
    assert again == flow, "a run's config.yaml has both"


def test_meanings_of_sigma(settings, train):
    """Catches meanings that nobody asked for, and logit_mean with the sign of this repository."""
    ours, theirs = settings(logit_mean=0.5), settings(logit_mean=0.5, videox_fun_meanings=True)
    flow_of = train.from_videox_fun.flow_of
    assert flow_of(ours.videox_fun, ours.flow, False) == ours.flow and ours.flow.timestep_sampling == "logit_normal"
    assert flow_of(theirs.videox_fun, theirs.flow, False).logit_mean == -0.5
    assert theirs.flow.timestep_sampling == "uniform", "no weighting_scheme is none there"
    assert settings(videox_fun_meanings=True, weighting_scheme="mode").flow.timestep_sampling == "mode"


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(1, 1, 1), (1, 1, 4), (2, 3, 2)])
def test_meaning_of_uniform_sampling(settings, edits, batch_size, accumulation, world_size):
    """Catches strata that are not the processes' own: each draws from its own part of [0, 1), at every step."""
    sizes = dict(train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    cfg = settings(uniform_sampling=True, videox_fun_meanings=True, **sizes)
    seen = []
    for rank in range(world_size):
        sampler = iter(MicroBatchSampler([(0, 0)] * 48, batch_size, accumulation, rank, world_size, cfg.run.seed))
        for _ in range(60 * accumulation):
            places = next(sampler)
            _, uniform, _ = edits.draws(cfg, places[0].step, [p.position for p in places], len(places[0].group))
            assert all(int(world_size * u) == rank for u in uniform.tolist())
            seen += [world_size * u % 1 for u in uniform.tolist()]
    assert min(seen) < 0.1 and max(seen) > 0.9


@pytest.mark.parametrize(
    ("side", "ratios"), [(512, [1]), (1024, [1, 1.25, 1.5, 2]), (1536, [1, 1.25, 1.5, 2, 2.5, 3])]
)
def test_meaning_of_random_hw_adapt(settings, edits, side, ratios):
    """Catches sizes that VideoX-Fun does not draw, and the full size drawn more or less often than nine times of
    ten."""
    cfg = settings(image_sample_size=side, random_hw_adapt=True, videox_fun_meanings=True)
    drawn = Counter(edits.size_at(cfg, (side, side), step, 16)[0] for step in range(2000))
    assert set(drawn) == {round(side / ratio / 16) * 16 for ratio in ratios}
    assert drawn[side] == 2000 if side == 512 else 1740 < drawn[side] < 1860
    assert settings(image_sample_size=256, random_hw_adapt=True, videox_fun_meanings=True)


def test_fix_sample_size(settings, edits):
    """Catches height and width exchanged, a size that is no multiple, and a random size in spite of it."""
    cfg = settings(image_sample_size=512, fix_sample_size=(400, 650), random_hw_adapt=True)
    size = edits.target_size(cfg, (100, 100), 16)
    assert size == (640, 400) and edits.target_size(cfg, (100, 100), 128) == (640, 384)
    assert {edits.size_at(cfg, size, step, 16) for step in range(9)} == {size}
    assert edits.fit_target(cfg, Image.new("RGB", (100, 100)), size).size == size


def test_max_train_samples(settings, load_rows, data_folder):
    """Catches rows that are left out of what is held out, and rows that are not left out."""
    some, every = (
        load_rows(settings(train_data_dir=data_folder, image_sample_size=256, num_validation_samples=2, **more))
        for more in (dict(max_train_samples=5), {})
    )
    assert [rows.records for rows in some] == [every[0].records[:5], every[1].records] and len(every[0].records) == 18


def test_random_flip(settings, edits, encoding, fine_folder, process, tmp_path, monkeypatch):
    """Catches a target that is mirrored without its sources, the same rows in every epoch, a mirrored picture that
    shares its cache entry with the plain one, and held-out rows that are mirrored."""
    cfg = settings(image_sample_size=256, random_flip=True, output_dir=tmp_path)
    records = [Record(n, f"{n}.png", "a", ("s.png",), digest=f"{n:08x}", source_sizes=((96, 64),)) for n in range(40)]
    rows = edits.Rows(records, [(256, 256)] * 40, [1] * 40, 16)
    flips = [[rows.view(cfg, n, 0, epoch).flip for n in range(40)] for epoch in range(3)]
    assert flips[0] != flips[1] != flips[2] and all(10 < sum(each) < 30 for each in flips)
    assert not any(view.flip for view in rows.first_views(cfg))
    assert not any(rows.view(settings(image_sample_size=256), n, 0, 0).flip for n in range(40))
    sampler = MicroBatchSampler([(256, 256)] * 40, 4, 1, 0, 1, cfg.run.seed)
    views = rows.views(cfg, sampler, max_train_steps=20)
    assert len({view.flip for view in views}) == 2

    cache = encoding.open_cache(cfg, process(), fine_folder)
    plain, mirrored = edits.View(0, (256, 256), 0), edits.View(0, (256, 256), 0, flip=True)
    keys = [
        [encoding.target_key(cache, records[0], view), encoding.source_key(cache, records[0], view, 0),
         encoding.prompt_key(cache, records[0], view, False)] for view in (plain, mirrored)
    ]  # fmt: skip
    assert not set(keys[0]) & set(keys[1])
    monkeypatch.setattr(edits, "load_picture", lambda *which: Image.fromarray(np.uint8([[[0] * 3, [255] * 3]])))
    wanted = encoding.what_to_encode(cfg, cache, [(rows, {mirrored})], [])
    pictures = [item for key, item in wanted.items() if key in keys[1][:2]] + wanted[keys[1][2]].sources
    assert len(pictures) == 3 and all(each.load("").getpixel((0, 0)) == (255, 255, 255) for each in pictures)


def test_another_vae(settings, encoding, fine_folder, process, tmp_path):
    """Catches a VAE's path that is not heeded, weights that do not fit and are taken, and latents of one VAE that the
    cache gives for another's."""
    device, base = torch.device("cpu"), encoding.load_vae(fine_folder, torch.device("cpu"), torch.float32)
    changed = {name: tensor + 1 for name, tensor in base.state_dict().items()}
    base.load_state_dict(changed)
    base.save_pretrained(tmp_path / "vae")
    file = next((tmp_path / "vae").glob("*.safetensors"))
    for path in (tmp_path / "vae", file):
        got = encoding.load_vae(fine_folder, device, torch.float32, str(path)).state_dict()
        assert all(torch.equal(got[name], changed[name]) for name in changed)
    paths = [[], ["--vae_path", file], ["--vae_path", tmp_path / "vae"]]
    caches = [settings(output_dir=tmp_path / str(n), **({"vae_path": p[1]} if p else {})) for n, p in enumerate(paths)]
    assert len({encoding.open_cache(cfg, process(), fine_folder).fingerprint_id for cfg in caches}) == 3
    with pytest.raises(ValueError, match=r"vae_path .* is no file and has no config.json"):
        encoding.load_vae(fine_folder, device, torch.float32, str(tmp_path))
    (other,) = (fine_folder / "transformer").glob("*.safetensors")
    with pytest.raises(ValueError, match=r"vae_path .* does not fit the model's VAE"):
        encoding.load_vae(fine_folder, device, torch.float32, str(other))


# ---- runs


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3", "fsdp2"])
def test_half_the_learning_rate(published, train, model_folder, tmp_path, strategy):
    """Catches a second group that trains at the whole rate, or not at all, or trains what nobody named: Adam's first
    step is the learning rate's size, whatever the gradient."""
    flags = ["--trainable_modules", "to_q", "--trainable_modules_low_learning_rate", "to_k", "to_q"]
    rate = 0.01
    flags += ["--mixed_precision=no", "--lr_warmup_steps=0", f"--learning_rate={rate}", "--adam_weight_decay=0"]
    output = published(strategy, tmp_path / "out", *flags, "--max_train_steps=1")
    assert "4 of them at half the learning rate" in output
    ours, base = weights(tmp_path / "out/export/transformer"), weights(model_folder / "transformer")
    moved = {name: (ours[name].float() - base[name].float()).abs().quantile(0.9).item() for name in base}
    assert {name for name, distance in moved.items() if distance > rate / 10} == {
        name for name in base if "to_q." in name or "to_k." in name
    }
    for name, distance in moved.items():
        if "to_q.weight" in name or "to_k.weight" in name:
            assert distance == pytest.approx(rate if "to_q" in name else rate / 2, rel=0.1), name


@pytest.mark.slow
def test_a_run_with_them_all(train, config, tmp_path):
    """Catches flags that are taken and then stop a run, and a resume that does not go on with them: equal to the last
    bit."""
    flags = ["--max_train_samples", 9, "--random_flip", "--fix_sample_size", 256, 384, "--videox_fun_meanings"]
    flags += ["--uniform_sampling", "--use_ema", "--trainable_modules", "attn", "--report_to", "all"]
    flags += ["--trainable_modules_low_learning_rate", "mlp", "--lr_scheduler", "cosine_with_restarts"]
    argv = ["--config", config, *flags, "--train_batch_size", 2, "--max_train_steps", 4, "--checkpointing_steps", 2]
    run_main(train, [*argv, "--output_dir", tmp_path / "straight", "--validation_steps", 4, "--export_model"])
    (tmp_path / "resumed").mkdir()
    argv += ["--output_dir", tmp_path / "resumed", "--export_model"]
    run_main(train, [*argv, "--resume_from_checkpoint", tmp_path / "straight/checkpoint-2"])
    assert column(tmp_path / "resumed") == column(tmp_path / "straight", from_step=3)
    ours, theirs = (weights(tmp_path / name / "export/transformer") for name in ("resumed", "straight"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = rules.flat(parsed(train, ["--config", tmp_path / "straight/config.yaml"]))
    assert rows["fix_sample_size"] == (256, 384) and rows["ema_decay"] == 0.9999

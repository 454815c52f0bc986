"""The settings that recipes share, with their help and their own rules, declared once, in groups.

A recipe's Config has the groups that it needs as fields of type Flat[...], so that flags and YAML files stay flat. A
group's rules are its `check`, which start/config.py calls when the last flag has won.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, TypeVar

import tyro

from common.image_settings import Buckets, Drawing, FlowMatching, Pictures
from common.rules import at_least, between, under_one

Group = TypeVar("Group")
Flat = Annotated[Group, tyro.conf.OmitArgPrefixes]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "flash_adamw", "adafactor"]


@dataclass
class Run:
    """Where results go, and how a run starts and goes on."""

    output_dir: str = ""
    """where everything is written; outputs/<recipe>/<config> of the repository when empty"""
    overwrite_output_dir: bool = False
    """delete what an earlier run saved in output_dir"""
    seed: int = 42
    """seed of everything that is drawn at random"""
    launch: str = "single"
    """launch file in accelerate/ that run.sh uses; LAUNCH=... overrides it"""
    checkpointing_steps: int = 500
    """steps between checkpoints, and one at the end; 0 saves none"""
    checkpoints_total_limit: int = 2
    """newest checkpoints kept; 0 keeps all"""
    resume_from_checkpoint: str | None = None
    """a checkpoint folder, or "latest" """
    logging_steps: int = 1
    """steps between rows of metrics.jsonl"""
    report_to: Literal["none", "wandb", "tensorboard", "trackio", "swanlab", "all"] = "none"
    """tracker, or all that are installed; wandb and swanlab are offline when not logged in or not reached; report.html
    is always written"""
    tracker_project_name: str = ""
    """project name at the tracker; the recipe folder's name when empty"""
    plan: bool = False
    """say what the run needs of memory, disk and time, and which settings fit, and stop; needs no data and no model"""
    dry_run: bool = False
    """check the data, encode and draw the first micro-batch, measure its losses, write it all to dry_run.html, and
    stop; no step is taken and no earlier result is touched"""
    gpus: str = ""
    """the machine to plan for, 4x24 for four GPUs of 24 GB; this one when not given"""
    ignore_plan: bool = False
    """go on although the run needs more than this machine has, by count"""
    benchmark: bool = False
    """random weights and inputs of the full size: print throughput, MFU and memory, and stop"""
    memory_limit_gib: float = 0.0
    """cap on the GPU memory that torch may take, to try what a smaller card holds; 0 takes all"""

    def check(self) -> None:
        at_least(self, 1, "logging_steps")
        between(self, 0, 2**32 - 1, "seed")  # what NumPy takes


@dataclass
class Data:
    """Which rows to train on."""

    train_data_dir: str | None = None
    """folder of the data, paths in its manifest are relative to it; "tiny" is the embedded drawn data. Image models
    read a manifest (JSON, JSONL, CSV, TSV), parquet, WebDataset shards (.tar), pictures with a .txt each, folders
    target and source, what datasets' save_to_disk wrote, a name on the hub, or a YAML list of such"""
    train_data_meta: str | None = None
    """manifest, where it is not found by its usual names in train_data_dir"""
    on_bad_rows: Literal["error", "skip"] = "error"
    """what a row that cannot be used does: stop with a list, or be left out and listed in bad_rows.jsonl"""
    dataloader_num_workers: int = 2
    """processes that prepare batches ahead"""

    def check(self) -> None:
        between(self, 0, 256, "dataloader_num_workers")


@dataclass
class Batch:
    """How many samples a step has, and how many steps there are."""

    train_batch_size: int = 1
    """samples a process sees at once"""
    gradient_accumulation_steps: int = 1
    """micro-batches a process adds up before a step"""
    global_batch_size: int = 0
    """samples a step over all processes; when given, it sets gradient_accumulation_steps"""
    max_train_steps: int = 1000
    """optimizer steps"""
    num_train_epochs: int = 0
    """when given, sets max_train_steps to this many passes over the data, unless the command line gives both"""

    def check(self) -> None:
        between(self, 1, 4096, "train_batch_size")
        between(self, 1, 100_000, "gradient_accumulation_steps")
        between(self, 0, 10_000_000, "global_batch_size")
        at_least(self, 1, "max_train_steps")

    def steps_for(self, rows: int, world_size: int) -> int:
        """max_train_steps, or what num_train_epochs passes over so many rows take."""
        return -(-self.num_train_epochs * rows // self.samples_a_step(world_size)) or self.max_train_steps

    def samples_a_step(self, world_size: int) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps * world_size


@dataclass
class Precision:
    """What weights are computed in."""

    mixed_precision: Literal["bf16", "no"] = "bf16"
    """compute in bf16; "no" is float32 throughout"""


@dataclass
class AdapterPrecision:
    """What a frozen base and its adapters are computed in."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """compute in bf16, or in fp16 with a loss scale, for cards without bf16; "no" is float32 throughout"""


@dataclass
class Speed:
    """What is recomputed, and what is compiled."""

    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, a quarter more time"""
    compile: bool = False
    """torch.compile the repeated blocks (about a minute at the start, faster steps on a GPU)"""


@dataclass
class Optim:
    """Learning rate, AdamW's numbers, clipping."""

    learning_rate: float = 5e-6
    """peak learning rate"""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"] = "constant"
    """after the warm-up: constant (by either name), or falling to zero at max_train_steps"""
    lr_warmup_steps: int = 0
    """steps of linear warm-up"""
    adam_beta1: float = 0.9
    """AdamW's first beta"""
    adam_beta2: float = 0.999
    """AdamW's second beta"""
    adam_weight_decay: float = 0.01
    """decoupled weight decay"""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon"""
    max_grad_norm: float = 1.0
    """global gradient norm to clip to; 0 does not clip"""

    def check(self) -> None:
        under_one(self, "adam_beta1", "adam_beta2")


@dataclass
class FullTuning:
    """How a transformer's own weights train, and what becomes of them."""

    transformer_path: str | None = None
    """another folder of weights to start from, for example export/transformer of an earlier run"""
    optimizer: Optimizer = "adamw"
    """see common/step/optimizers.py for memory and where each may run"""
    gradient_release: bool = False
    """step each parameter inside backward and free its gradient; no accumulation, no clipping"""
    ema_decay: float = 0.0
    """decay (0.999 for example) of averaged weights for validation and export, 4 bytes a parameter; 0 keeps none"""
    nvme_path: str | None = None
    """fast disk for LAUNCH=zero3_nvme; <output_dir>/nvme when not given"""
    stream_blocks: int = 0
    """blocks that live in pinned main memory and visit the GPU one after the other; -1 is all of them"""
    offload_activations: bool = False
    """keep the inputs of checkpointed and of streamed blocks in pinned main memory until their backward"""
    export_model: bool = True
    """write the trained weights to export/ at the end"""
    export_steps: int = 0
    """steps between exports to export/step_...; 0 writes none before the end"""
    signed: ClassVar[tuple[str, ...]] = ("stream_blocks",)

    def check(self) -> None:
        under_one(self, "ema_decay")
        at_least(self, -1, "stream_blocks")


@dataclass
class Lora:
    """Adapters on a frozen transformer, in place of training its own weights."""

    lora_rank: int = 0
    """rank of the LoRA adapters; 0, in recipes that can do without, trains the model's own weights"""
    lora_alpha: int = 16
    """an adapter's output is multiplied by lora_alpha / lora_rank"""
    lora_dropout: float = 0.0
    """dropout of the adapters' inputs"""
    use_rslora: bool = False
    """multiply by lora_alpha / sqrt(lora_rank) instead (rank-stabilised LoRA)"""
    lora_layers: tuple[str, ...] = (".attn.",)
    """linear layers whose names contain one of these get adapters: ".attn." is attention's projections, "_blocks."
    every linear layer of the blocks"""
    lora_skip_layers: tuple[str, ...] = ()
    """of those, layers whose names contain one of these get none"""
    base_precision: Literal["bf16", "nf4"] = "bf16"
    """what LoRA's frozen base is kept in: bf16 (float32 under mixed_precision no), or its blocks' linear layers in 4
    bits (bitsandbytes, NF4 with double quantisation), about half a byte a parameter"""

    def check(self) -> None:
        between(self, 0, 4096, "lora_rank")
        at_least(self, 1, "lora_alpha")
        under_one(self, "lora_dropout")
        if self.base_precision == "nf4" and not self.lora_rank:
            raise ValueError(
                "base_precision nf4 is for a frozen base, and lora_rank 0 trains its own weights; add --lora_rank 32"
            )


@dataclass
class AdapterTuning:
    """How small adapters on a frozen base train."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """see common/step/optimizers.py for memory and where each may run"""
    # of full tuning alone
    gradient_release: ClassVar[bool] = False
    ema_decay: ClassVar[float] = 0.0
    nvme_path: ClassVar[str | None] = None
    stream_blocks: ClassVar[int] = 0
    offload_activations: ClassVar[bool] = False
    export_model: ClassVar[bool] = True
    export_steps: ClassVar[int] = 0


@dataclass
class Validation:
    """When to validate."""

    validation_steps: int = 100
    """steps between validations, and one before the first step and at the end; 0 does none"""


class Shared(Protocol):
    """What common/ knows of every recipe's Config."""

    pretrained_model_name_or_path: str
    run: Run
    data: Data
    batch: Batch
    precision: Precision | AdapterPrecision
    speed: Speed
    optim: Optim
    tuning: FullTuning | AdapterTuning
    validation: Validation


class Pictured(Shared, Protocol):
    """What common/ knows of an image recipe's Config."""

    pictures: Pictures
    drawing: Drawing


class Bucketed(Pictured, Protocol):
    """What common/ knows of a Config of flow matching on pictures in buckets."""

    buckets: Buckets
    flow: FlowMatching


class Adapted(Shared, Protocol):
    """What common/ knows of a Config with LoRA."""

    lora: Lora

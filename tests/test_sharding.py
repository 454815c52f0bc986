"""common/model/sharding.py: fully_shard in one process, which blocks it takes and which dtypes they see."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.model.sharding import shard, shard_model

seen = {}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen["input"], seen["rotary"], seen["weight"] = x.dtype, rotary[0].dtype, self.linear.weight.dtype
        return self.linear(x)


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, angles = self.embed(x), torch.arange(8.0)
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()))
        return x


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_blocks_compute_in_bf16_with_float32_positions(process_group):
    """Catches rotary embeddings that are rounded to bf16 on the way into a block, which no other strategy does."""
    model = shard_model(Model(), ["Block"], torch.device("cpu"), torch.bfloat16, offload=False, reshard=True)
    output = model(torch.randn(3, 4))
    output.sum().backward()
    assert seen == {"input": torch.bfloat16, "rotary": torch.float32, "weight": torch.bfloat16}
    assert output.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_block_class_that_is_not_there(process_group):
    """Catches a class that is not the model's, which would leave the model one whole shard."""
    with pytest.raises(ValueError, match="no module of class 'Blok'"):
        shard_model(Model(), ["Blok"], torch.device("cpu"), None, offload=False, reshard=True)


@pytest.mark.parametrize(
    ("launch_file", "sharded"),
    [({}, ["blocks.0", "blocks.1"]), ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Linear"}, ["embed", "blocks.0.linear"])],
)
def test_blocks_are_the_models_own_unless_the_launch_file_names_some(process_group, launch_file, sharded):
    """Catches a model that is gathered as a whole, because no launch file named its blocks."""
    on_cpu = {"device": torch.device("cpu"), "offload": False, "fsdp": launch_file}
    run = SimpleNamespace(strategy="fsdp2", compute_dtype=torch.float32, weights_dtype=torch.float32, **on_cpu)
    model = shard(run, Model())
    names = {name for name, module in model.named_modules() if hasattr(module, "reshard")}
    assert names >= {"", *sharded} and ("blocks.0" in names) == (not launch_file), names
    single = Model()
    assert shard(SimpleNamespace(strategy="single"), single) is single and not hasattr(single, "reshard")

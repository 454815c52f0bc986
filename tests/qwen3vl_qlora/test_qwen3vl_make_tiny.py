"""make_tiny.py and its pretraining: shortcuts compute what transformers computes, weights fit the words, data stay."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny import pretrain_qwen3vl


def test_every_word_is_one_token(make_tiny, processor):
    """Catches answers of many tokens, which a model this small would not learn to spell."""
    tokenizer = processor.tokenizer
    for text in random.Random(0).sample(make_tiny.known_texts(), 300):
        assert len(tokenizer(text).input_ids) <= len(text.replace("?", " ?").split()) + 2 * sum(
            text.count(c) for c in ".,:\n"
        )
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer("unheard of: zebra Ünlü\n").input_ids) == "unheard of: zebra Ünlü\n"


def test_attention_in_batches_is_the_same(make_tiny, processor):
    """Catches a pretraining of another model than the one that is used: its attention and its rotary positions."""
    jobs, rows = pretrain_qwen3vl.pretraining_rows(3, 2, 4)
    pictures = [pretrain_qwen3vl.draw(job) for job in jobs]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].unflatten(0, (len(pictures), -1))
    input_ids, labels, numbers = pretrain_qwen3vl.encode(rows, processor)
    assert (numbers[-4:] >= -1).all() and (labels[labels >= 0] == input_ids[labels >= 0]).all()
    model = make_tiny.build_model(processor, weights=None)
    seen = pixels[numbers[numbers >= 0]].flatten(0, 1)
    expected = pretrain_qwen3vl.loss_of(model, input_ids, labels, seen)
    pretrain_qwen3vl.attend_in_batches(model)
    positions = pretrain_qwen3vl.positions(model, input_ids)
    found = pretrain_qwen3vl.loss_of(model, input_ids, labels, seen, positions)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert pretrain_qwen3vl.loss_of(model, input_ids, labels, seen, positions * 0).item() != pytest.approx(
        expected.item(), rel=1e-3
    )


def test_pretraining_never_sees_the_pools(make_tiny):
    """Catches a base that has seen the faces and objects it is asked about."""
    jobs, _ = pretrain_qwen3vl.pretraining_rows(4000, 1500, 10)
    drawn = {what for what, _ in jobs}
    assert not drawn & set(make_tiny.faces.choose_pool_faces(make_tiny.POOL_FACES, 0))
    people = make_tiny.generate_data.make_entities(make_tiny.face_config())
    assert len(people) == 8 and not drawn & {person.face for person in people}


def test_pools_are_those_that_pretraining_leaves_out(make_tiny, tmp_path, monkeypatch):
    """Catches a pool that is drawn by another rule than the one that pretraining knows it by."""
    drawn = []
    monkeypatch.setattr(
        make_tiny.object_pool, "draw_object", lambda scene, size, rng: drawn.append(scene) or Picture()
    )
    make_tiny.object_pool.generate(tmp_path, make_tiny.POOL_OBJECTS, image_size=32)
    jobs, _ = pretrain_qwen3vl.pretraining_rows(1, 3000, 1)
    assert len(set(drawn)) == make_tiny.POOL_OBJECTS and not set(drawn) & {what for what, _ in jobs}


class Picture:
    def save(self, path: Path) -> None:
        path.write_bytes(b"")


def test_weights_are_bound_to_the_words(make_tiny, processor, tmp_path):
    """Catches weights that are loaded with a vocabulary in which every word has moved."""
    model = make_tiny.build_model(processor, weights=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    pretrain_qwen3vl.save_weights(model, processor, tmp_path / "w.safetensors")
    again = make_tiny.build_model(processor, tmp_path / "w.safetensors")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3), name
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    other = make_tiny.build_processor()
    other.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="made with other words"):
        make_tiny.load_weights(again, other, tmp_path / "w.safetensors")


@pytest.mark.slow
def test_pretraining_writes_weights_that_make_reads(make_tiny, processor, tmp_path, capsys):
    """A trial of a few steps: what it writes is what the model is built of."""
    weights = tmp_path / "weights.safetensors"
    pretrain_qwen3vl.pretrain(weights, scale=0.001)
    assert "24 steps of 32 on cpu" in capsys.readouterr().out or torch.cuda.is_available()
    assert make_tiny.make(tmp_path / "tiny", weights) and not make_tiny.make(tmp_path / "tiny", weights)
    embedding = make_tiny.build_model(processor, weights).lm_head.weight
    stored = load_file(weights)["model.language_model.embed_tokens.weight"]
    torch.testing.assert_close(embedding.half(), stored, atol=0, rtol=0)


@pytest.mark.slow
def test_made_once(make_tiny, tmp_path):
    """Catches a model or data that is made anew each time, not made anew when something changed, or differs."""
    assert make_tiny.make(tmp_path) and not make_tiny.make(tmp_path)
    files = [path for path in sorted((tmp_path / "data").rglob("*")) if path.is_file()]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    (tmp_path / "stamp.txt").write_text("old")
    assert make_tiny.make(tmp_path)
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == digests
    assert {path.name for path in tmp_path.iterdir()} == {"model", "data", "stamp.txt"}

"""Packing: nothing of a checkpoint is lost, damage is found, an interrupted pack leaves nothing."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.kernels.cpu import Kernels
from specmoeoff.runtime import build_folder, pack
from specmoeoff.runtime.architectures import expert_tensor_names
from specmoeoff.runtime.checkpoint import Checkpoint, from_bf16, to_bf16


def packed_folders() -> list[Path]:
    root = Path(os.environ["SPECMOEOFF_CACHE"]) / "packed"
    return [path for path in root.iterdir() if path.is_dir()] if root.exists() else []


def linear(x: np.ndarray, packed: np.ndarray, n_out: int) -> np.ndarray:
    out = np.zeros((len(x), n_out), np.float32)
    Kernels(1).linear(x, packed, n_out, out)
    return out


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_dense_weights_survive_packing(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    packed = pack.pack_model(folder)
    dense = packed.load_dense()
    # Rows of the identity times a packed matrix are its columns, exactly.
    one = to_bf16(np.eye(64, dtype=np.float32))
    with Checkpoint(folder) as checkpoint:
        np.testing.assert_array_equal(dense["embedding"], checkpoint.tensor_bf16("model.embed_tokens.weight"))
        np.testing.assert_array_equal(dense["norm"], checkpoint.tensor_f32("model.norm.weight"))
        np.testing.assert_array_equal(linear(one, dense["lm_head"], 96).T, checkpoint.tensor_f32("lm_head.weight"))
        for layer in range(3):
            ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
            qkv = [checkpoint.tensor_f32(f"{theirs}self_attn.{part}_proj.weight") for part in "qkv"]
            np.testing.assert_array_equal(linear(one, dense[ours + "qkv"], 256).T, np.concatenate(qkv))
            for norm, name in (("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm")):
                np.testing.assert_array_equal(dense[ours + norm], checkpoint.tensor_f32(f"{theirs}{name}.weight"))
            assert (ours + "router" in dense) == (kind == "mixtral")


def test_a_tied_head_is_the_embedding(save_model: object) -> None:
    folder = save_model("llama", tie_word_embeddings=True)  # type: ignore[operator]
    dense = pack.pack_model(folder).load_dense()
    one = to_bf16(np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(linear(one, dense["lm_head"], 96).T, from_bf16(dense["embedding"]))


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_every_expert_lies_at_its_offset_and_computes_its_own_ffn(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    packed = pack.pack_model(folder)
    spec = packed.spec
    assert packed.expert_stride % 4096 == 0
    assert packed.expert_path.stat().st_size == spec.n_all_experts * packed.expert_stride
    x = to_bf16(np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32))
    data = packed.expert_path.read_bytes()
    resident = packed.load_experts()
    with Checkpoint(folder) as checkpoint:
        for layer in range(spec.n_layers):
            for expert in range(spec.n_experts):
                offset = packed.expert_offset(layer, expert)
                raw = np.frombuffer(data, np.uint8, packed.expert_bytes, offset).copy()
                np.testing.assert_array_equal(resident[layer * spec.n_experts + expert], raw)
                out = np.zeros((4, 64), np.float32)
                Kernels(1).experts(x, [raw], [np.arange(4, dtype=np.int32)], out, spec.intermediate)
                names = expert_tensor_names(spec, layer, expert)
                gate, up, down = (checkpoint.tensor_f32(name).astype(np.float64) for name in names)
                a = from_bf16(x).astype(np.float64)
                g = a @ gate.T
                wanted = (g / (1 + np.exp(-g)) * (a @ up.T)) @ down.T
                # Activations are rounded to bf16 between the projections: 2**-8 relative to the largest.
                np.testing.assert_allclose(out, wanted, atol=2**-8 * np.abs(wanted).max(), rtol=0)


def test_a_second_pack_takes_the_first(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack.pack_model(mixtral)
    monkeypatch.setattr(pack, "pack_expert", lambda *_: pytest.fail("packed again"))
    assert pack.pack_model(mixtral).folder == first.folder


def test_dense_bytes_is_what_load_dense_takes(mixtral: Path) -> None:
    packed = pack.pack_model(mixtral)
    assert packed.dense_bytes == (packed.folder / "dense.bin").stat().st_size


def test_a_flipped_bit_is_found_in_its_expert(mixtral: Path) -> None:
    packed = pack.pack_model(mixtral)
    assert packed.damaged_experts() == []
    with packed.expert_path.open("r+b") as stream:
        stream.seek(packed.expert_offset(2, 3) + 12345)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 4]))
    assert packed.damaged_experts() == [(2, 3)]


@pytest.mark.parametrize("n_cut", [100, 4096, 5000])
def test_a_dense_file_cut_short_gets_a_sentence(mixtral: Path, n_cut: int) -> None:
    packed = pack.pack_model(mixtral)
    path = packed.folder / "dense.bin"
    os.truncate(path, path.stat().st_size - n_cut)
    with pytest.raises(BadInput, match=r"dense\.bin: ends early; delete the folder"):
        packed.load_dense()


def test_an_expert_file_cut_short_is_packed_anew(mixtral: Path) -> None:
    packed = pack.pack_model(mixtral)
    os.truncate(packed.expert_path, 4096)
    assert pack.pack_model(mixtral).damaged_experts() == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pack_leaves_nothing_and_the_next_one_succeeds(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def progress(what: str, n_done: int, n_all: int) -> None:
        if n_done == 2:
            raise interruption

    with pytest.raises(interruption):
        pack.pack_model(mixtral, progress)
    assert packed_folders() == []
    assert pack.pack_model(mixtral).damaged_experts() == []


def test_what_a_killed_pack_left_is_removed(mixtral: Path) -> None:
    final = pack.pack_model(mixtral).folder
    partial = final.with_name(f".{final.name}.partial")
    shutil.move(final, partial)
    (partial / "manifest.json").unlink()
    assert pack.pack_model(mixtral).folder == final
    assert packed_folders() == [final]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BadInput, match=r"packing tiny-mixtral needs [\d,]+ bytes and the disk lacks [\d,]+ of them"):
        pack.pack_model(mixtral)
    assert packed_folders() == []


def test_a_disk_that_fills_up_while_packing_leaves_nothing(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack, "_write_dense", full)
    with pytest.raises(BadInput, match="the disk is full"):
        pack.pack_model(mixtral)
    assert packed_folders() == []


def test_packing_the_same_checkpoint_elsewhere_gives_the_same_bytes(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> dict[str, str]:
        folder = pack.pack_model(mixtral).folder
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    first = digest()
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path / "other"))
    assert digest() == first

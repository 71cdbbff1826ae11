"""Parameters from files."""

import json
import shutil
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.adapters import files

RNG = np.random.default_rng(0)
PARAMS = {
    "fc.weight": RNG.standard_normal((3, 2)).astype(np.float32),
    "fc.bias": RNG.standard_normal(3).astype(np.float32),
    "scale": np.float32(2.5),
}


def same(loaded, wanted):
    assert set(loaded) == set(wanted)
    for name, value in wanted.items():
        assert isinstance(loaded[name], jax.Array)
        assert loaded[name].dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(loaded[name], value)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def test_json_of_nested_lists(tmp_path):
    path = write(tmp_path / "p.json", {k: v.tolist() for k, v in PARAMS.items()})
    same(files.load(path), PARAMS)
    nested = files.load(write(tmp_path / "q.json", {"a": {"b": [[1, 2], [3, 4]]}, "c": 5}))
    np.testing.assert_array_equal(nested["a"]["b"], [[1, 2], [3, 4]])
    assert nested["c"].shape == () and nested["a"]["b"].dtype == np.float32


def test_npz(tmp_path):
    np.savez(tmp_path / "p.npz", **PARAMS)
    same(files.load(str(tmp_path / "p.npz")), PARAMS)


@pytest.mark.frameworks
def test_safetensors(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(PARAMS | {"scale": np.ones(1, np.float32)}, tmp_path / "p.safetensors")
    same(files.load(tmp_path / "p.safetensors"), PARAMS | {"scale": np.ones(1, np.float32)})
    half = {"x": np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))}
    numpy.save_file(half, tmp_path / "h.safetensors")
    same(files.load(tmp_path / "h.safetensors"), half)


@pytest.mark.frameworks
def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "p.gguf", "llama")
    writer.add_tensor("a", PARAMS["fc.weight"])
    rounded = RNG.standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quantize(rounded, kind)
    writer.add_tensor("b", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = files.load(tmp_path / "p.gguf")
    same(loaded, {"a": PARAMS["fc.weight"], "b": gguf.dequantize(packed, kind)})
    # Half a step of a grid of 127 steps between 0 and the largest of each 32.
    assert np.abs(loaded["b"] - rounded).max() <= np.abs(rounded).max() / 254 * 1.01


def test_float64_needs_the_64_bit_mode(tmp_path):
    np.savez(tmp_path / "p.npz", a=np.ones(3))
    with pytest.raises(ValueError, match=r"'a' in .* is float64.*jax_enable_x64"):
        files.load(tmp_path / "p.npz")
    with jax.enable_x64(True):
        assert files.load(tmp_path / "p.npz")["a"].dtype == np.float64


class TestBadInput:
    @pytest.mark.parametrize(
        "suffix",
        [
            "json",
            "npz",
            pytest.param("safetensors", marks=pytest.mark.frameworks),
            pytest.param("gguf", marks=pytest.mark.frameworks),
        ],
    )
    @pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"GGUF\x03\0\0\0" + b"\xff" * 40])
    def test_a_file_that_is_not_what_its_name_says(self, suffix, content, tmp_path):
        if suffix in ("safetensors", "gguf"):
            pytest.importorskip(suffix)
        kind = {"json": "JSON", "npz": "NPZ", "gguf": "GGUF"}.get(suffix, suffix)
        with pytest.raises(ValueError, match=f"is not the {kind} file that its name says"):
            files.load(write(tmp_path / f"p.{suffix}", content))

    def test_formats_under_another_name(self, tmp_path):
        np.savez(tmp_path / "p.npz", **PARAMS)
        shutil.copy(tmp_path / "p.npz", tmp_path / "p.json")
        with pytest.raises(ValueError, match="is not the JSON file"):
            files.load(tmp_path / "p.json")
        with (tmp_path / "one.npz").open("wb") as file:
            np.save(file, np.ones(3))
        with pytest.raises(ValueError, match="is not the NPZ file .* no archive"):
            files.load(tmp_path / "one.npz")

    def test_headers_that_claim_more_than_there_is(self, tmp_path):
        np.savez(tmp_path / "p.npz", a=np.ones(3, np.float32))
        with zipfile.ZipFile(tmp_path / "p.npz") as given:
            content = given.read("a.npy")
        claim = b"'shape': (3,), }" + b" " * 14
        assert claim in content
        content = content.replace(claim, b"'shape': (999999999999999,), }")
        with zipfile.ZipFile(tmp_path / "q.npz", "w") as made:
            made.writestr("a.npy", content)
        with pytest.raises(ValueError, match=r"is not the NPZ file.*claims 3999999999999996 bytes"):
            files.load(tmp_path / "q.npz")

    def test_integers_beyond_32_bits(self, tmp_path):
        np.savez(tmp_path / "p.npz", a=np.asarray([1, 2**32 + 1]))
        with pytest.raises(ValueError, match=r"'a' in .* must fit in int32.* got 4294967297"):
            files.load(tmp_path / "p.npz")

    def test_what_can_run_code(self, tmp_path):
        for name in ("model.pt", "model.pth", "model.bin", "model.ckpt", "model.pkl"):
            with pytest.raises(ValueError, match=r"can run code on load.*safetensors"):
                files.load(tmp_path / name)
        np.savez(tmp_path / "p.npz", a=np.array([{}], dtype=object))
        with pytest.raises(ValueError, match="'a' in .* is not an array of numbers"):
            files.load(tmp_path / "p.npz")
        np.savez(tmp_path / "t.npz", a=np.array(["x"]))
        with pytest.raises(ValueError, match="is not an array of numbers"):
            files.load(tmp_path / "t.npz")

    @pytest.mark.parametrize(
        "content,match",
        [
            ({"a": [[1, 2], [3]]}, "'a' in .* lists of equal lengths"),
            ({"a": {"b": ["1", "2"]}}, r"'a\.b' in .* must be a number"),
            ({"a": [True]}, "'a' in .* must be a number"),
            ({"a": None}, "'a' in .* must be a number"),
            ({"a": [float("nan")]}, "'a' in .* is not finite"),
            ([1, 2], "must hold an object of parameters by name, got a list"),
            ({}, "holds no parameters"),
        ],
    )
    def test_json(self, content, match, tmp_path):
        with pytest.raises(ValueError, match=match):
            files.load(write(tmp_path / "p.json", content))

    def test_paths(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.npz"):
            files.load(tmp_path / "none.npz")
        with pytest.raises(ValueError, match=r"must end in one of \.json, \.npz"):
            files.load(tmp_path / "weights.txt")

    def test_a_missing_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        (tmp_path / "p.safetensors").touch()
        with pytest.raises(ImportError, match=r"pip install 'curvax\[files\]'"):
            files.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    "adapter,module,extra",
    [
        ("torch", "torch", "torch"),
        ("flax", "flax.linen", "flax"),
        ("equinox", "equinox", "equinox"),
        ("keras", "keras", "keras"),
    ],
)
def test_a_missing_framework(adapter, module, extra, monkeypatch):
    """Each adapter names the extra that installs its framework."""
    import curvax.adapters

    for name in [name for name in sys.modules if name.startswith(f"curvax.adapters.{adapter}")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == adapter]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(vars(curvax.adapters), adapter, raising=False)
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'curvax\[{extra}\]'"):
        getattr(curvax.adapters, adapter)


def test_the_core_imports_no_framework():
    """In a fresh interpreter: curvax, its adapters' package and the files' adapter."""
    import subprocess

    code = (
        "import sys, curvax as cx; cx.adapters.files, cx.compat, cx.hessian, cx.Model;"
        "print([m for m in ('torch', 'keras', 'flax', 'equinox', 'transformers', 'gguf')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

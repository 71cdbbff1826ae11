"""Results as files: they give back what was saved, and damaged ones say so."""

import json
import re
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from tests.results.fake_results import (
    fake_blocks,
    fake_diagonal,
    fake_result,
    fake_trace,
    odd_results,
)
from tests.results.files import assert_same, rewrite

import curvax as cx
from curvax.results import DiagonalResult, EigenResult, TraceResult
from curvax.results.stored import Stored

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("name", odd_results())
def test_every_class_is_restored_from_the_npz_alone(tmp_path, name):
    result = odd_results()[name]
    npz, text = result.save(tmp_path / "deep" / "run")
    text.unlink()
    assert_same(type(result).load(npz), result)
    assert_same(cx.load(str(tmp_path / "deep" / "run")), result)
    assert [path.name for path in npz.parent.iterdir()] == ["run.npz"]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
dtypes = st.sampled_from([">f4", "f2", "f8", "c8", "i1", "u8", "?", "bfloat16", "float8_e4m3fn"])


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(dtypes))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    size = int(np.prod(shape)) * dtype.itemsize
    bits = draw(st.binary(min_size=size, max_size=size))
    if dtype == np.bool_:
        bits = bytes(byte & 1 for byte in bits)
    array = np.frombuffer(bits, dtype).reshape(shape)
    return array[()] if not shape and dtype.kind in "biuf" else array


keys = st.recursive(st.text() | st.integers(), lambda key: st.tuples(key, key), max_leaves=3)
pytrees = st.recursive(
    scalars | arrays(),
    lambda tree: (
        st.lists(tree, max_size=3)
        | st.lists(tree, max_size=3).map(tuple)
        | st.dictionaries(keys, tree, max_size=3)
    ),
    max_leaves=12,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(pytrees)
@hypothesis.example({"a.b": np.zeros(1), "a": {"b": np.ones(1)}, "a\0b": np.full(1, 2.0)})
@hypothesis.example([np.frombuffer(b"\0}", np.float16)[0]])  # a signalling NaN
@hypothesis.example({"x" * 300 + end: np.full(2, 3.0) for end in "yz"})
def test_pytrees_are_restored_exactly(tree):
    with tempfile.TemporaryDirectory() as folder:
        npz, _ = DiagonalResult(tree, None, 1, "exact", 1, 1, None, {}).save(Path(folder, "x"))
        assert_same(DiagonalResult.load(npz).estimate, tree)


class Layer(NamedTuple):
    w: np.ndarray
    b: list


def test_other_nodes_become_dicts_of_arrays_by_name(tmp_path):
    tree = [Layer(jnp.ones(2), [1.0, np.zeros(3)]), OrderedDict(z=np.arange(2), a=np.ones(1))]
    npz, _ = fake_diagonal(tree, stderr=None).save(tmp_path / "x")
    first, second = cx.load(npz).estimate
    assert_same(first, {"w": np.ones(2, np.float32), "b.0": np.array(1.0), "b.1": np.zeros(3)})
    assert_same(second, {"z": np.arange(2), "a": np.ones(1)})


def test_arrays_have_names_that_people_can_read(tmp_path):
    tree = {"blocks": [{"w": jnp.ones((2, 2), jnp.bfloat16)}]}
    npz, _ = fake_result([3.0, 1.0], eigenvectors=tree).save(tmp_path / "x")
    with np.load(npz, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["eigenvalues"], [3.0, 1.0])
        assert stored["eigenvectors.blocks.0.w"].dtype == np.uint16
        facts = json.loads(str(stored["facts"]))
    assert facts["format"] == 2 and facts["result"]["class"] == "EigenResult"
    assert facts["version"] == cx.__version__
    npz, _ = fake_blocks(["x.0.mlp"], lambda i: fake_result([3.0])).save(tmp_path / "y")
    with np.load(npz) as stored:
        np.testing.assert_array_equal(stored["results.x.0.mlp.eigenvalues"], [3.0])


def test_the_json_is_for_people(tmp_path):
    vectors = {"w": np.ones((2, 1000))}
    result = fake_result([2.0, 1.0], residuals=[NAN, INF], eigenvectors=vectors)
    facts = json.loads(result.save(tmp_path / "x")[1].read_text(), parse_constant=pytest.fail)
    assert facts["class"] == "EigenResult" and "eigenvectors" not in facts
    assert facts["eigenvalues"] == [2.0, 1.0] and facts["residuals"] == [None, None]
    assert facts["num_matvecs"] == 60 and facts["num_verification"] == 2
    assert facts["history"][-1]["matvecs"] == 60
    blocks = fake_blocks("ab", lambda i: fake_trace(1.0, INF))
    facts = json.loads(blocks.save(tmp_path / "x")[1].read_text(), parse_constant=pytest.fail)
    assert facts["results"]["b"]["class"] == "TraceResult" and facts["sizes"]["b"] == 100
    assert facts["results"]["a"]["stderr"] is None


@pytest.mark.parametrize(
    "value, message",
    [
        ([object()], "estimate.0 cannot be saved.*got object"),
        (np.array([None]), "estimate must hold numbers.*Python objects"),
    ],
)
def test_what_no_file_holds_is_refused(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        fake_diagonal(value, stderr=None).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    old = fake_trace(1.0)
    files = old.save(tmp_path / "x")
    before = [path.read_bytes() for path in files]

    def interrupted(stream, **arrays):
        stream.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", interrupted)
        fake_trace(2.0).save(tmp_path / "x")
    assert [path.read_bytes() for path in files] == before and len(list(tmp_path.iterdir())) == 2
    fake_trace(2.0).save(tmp_path / "x")
    assert cx.load(tmp_path / "x").estimate == 2.0


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    for path in fake_trace().save(tmp_path / "x"):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_of_another_class_names_both(tmp_path):
    npz, _ = fake_trace().save(tmp_path / "x")
    with pytest.raises(TypeError, match=r"x\.npz holds a TraceResult, expected a EigenResult"):
        EigenResult.load(npz)
    assert isinstance(Stored.load(npz), TraceResult)


def test_missing_files_and_wrong_suffixes(tmp_path):
    npz, text = fake_trace().save(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"no result at .*y\.npz"):
        cx.load(tmp_path / "y")
    with pytest.raises(ValueError, match=r"x\.json is the copy for people.*load .*x\.npz"):
        cx.load(text)
    npz.rename(tmp_path / "x.dat")
    with pytest.raises(FileNotFoundError, match=r"x\.dat exists, but.*\.npz"):
        cx.load(tmp_path / "x.dat")


@pytest.mark.parametrize(
    "written, by", [({"version": "9.1.0"}, r"curvax 9\.1\.0"), ({}, r"curvax \(unknown\)")]
)
def test_a_newer_format_is_refused_by_version(tmp_path, written, by):
    npz, _ = fake_trace().save(tmp_path / "x")
    newer = {"format": 3, "result": "in a new way"} | written

    def change(facts):
        facts.clear()
        facts.update(newer)

    rewrite(npz, change)
    here = rf"this is curvax {re.escape(cx.__version__)}, which reads formats up to 2"
    remedy = "pip install --upgrade curvax, or compute the result again"
    with pytest.raises(
        ValueError, match=rf"x\.npz was written by {by} in format 3, but {here}: {remedy}"
    ):
        cx.load(npz)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda facts: facts["result"].update({"class": "Other"}), "a Other, which is not known"),
        (lambda facts: facts["result"]["fields"].pop("seed"), "seed"),
        (lambda facts: facts.update(result=3), "holds a int, which is no result"),
        (lambda facts: facts.pop("format"), "facts are not a result's"),
        (lambda facts: facts.update(format=0), "facts are not a result's"),
        (lambda facts: facts["result"].update(kind="heap"), "'heap' is no kind"),
    ],
)
def test_facts_that_make_no_result(tmp_path, change, message):
    npz, _ = fake_trace().save(tmp_path / "x")
    rewrite(npz, change)
    with pytest.raises(ValueError, match=rf"x\.npz is damaged, or.*{message}"):
        cx.load(npz)


def foreign(path):
    """Files that are no results."""
    path.write_bytes(b"")
    yield
    path.write_bytes(b"not an archive")
    yield
    np.savez(path, a=np.ones(3))
    yield
    np.savez(path, facts=np.array([{"format": 1}], dtype=object))  # a pickle
    yield
    with path.open("wb") as stream:
        np.save(stream, np.ones(3))
    yield
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("facts.npy", b"text")
    yield


def test_foreign_files_are_named(tmp_path):
    path = tmp_path / "x.npz"
    for _ in foreign(path):
        with pytest.raises(ValueError, match=r"x\.npz is damaged, or was not written by"):
            cx.load(path)


def test_damaged_files_never_give_another_result(tmp_path, rng):
    result = fake_trace(steps=2)
    npz, _ = result.save(tmp_path / "x")
    whole = npz.read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :]
        for i, bit in zip(
            rng.choice(len(whole), 300, replace=False), rng.integers(1, 256, 300), strict=True
        )
    ]
    cut = [whole[:size] for size in rng.choice(len(whole), 50, replace=False)]
    refused = 0
    for content in flipped + cut:
        npz.write_bytes(content)
        try:
            restored = cx.load(npz)
        except ValueError as error:
            assert str(npz) in str(error) and "damaged" in str(error)
            refused += 1
        else:  # a byte that means nothing, such as a time stamp
            assert_same(restored, result)
    assert refused > 250


def test_an_array_that_a_damaged_header_shortens_is_noticed(tmp_path):
    npz, _ = fake_trace(steps=20).save(tmp_path / "x")
    npz.write_bytes(npz.read_bytes().replace(b"'shape': (20,)", b"'shape': (19,)"))
    with pytest.raises(
        ValueError, match=r"x\.npz is damaged.*the checksum of samples\.npy is wrong"
    ):
        cx.load(npz)


def with_header(source, target, name, old, new):
    """A copy of an archive, an array of which has another header of the same length."""
    assert len(old) == len(new)
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(target, "w") as made:
        for member in given.namelist():
            content = given.read(member)
            if member == name:
                assert old in content
                content = content.replace(old, new)
            made.writestr(member, content)


@pytest.mark.parametrize(
    "new",
    [
        b"'shape': (999999999999999,), }",  # a petabyte
        b"'shape': (99999, 9999999999),}",
        b"'shape': (-1,),              }",
        b"'shape': (19,),              }",
        b"'shape': (21,),              }",
        b"'shape': (99999999999999**9,)}",
    ],
)
def test_a_header_that_claims_more_than_there_is(tmp_path, new):
    """Before anything of that size is allocated; the checksums are right."""
    npz, _ = fake_trace(steps=20).save(tmp_path / "x")
    with zipfile.ZipFile(npz) as archive:
        header = archive.read("samples.npy")[10:128]
    old = header[header.index(b"'shape'") :][: len(new)]
    with_header(npz, tmp_path / "y.npz", "samples.npy", old, new)
    with pytest.raises(ValueError, match=r"y\.npz is damaged, or was not written by"):
        cx.load(tmp_path / "y")


def test_a_header_of_another_version_or_length(tmp_path):
    npz, _ = fake_trace(steps=20).save(tmp_path / "x")
    for old, new in (
        (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x09\x00"),
        (b"\x93NUMPY\x01\x00\x76\x00", b"\x93NUMPY\x02\x00\xff\xff"),
    ):
        with_header(npz, tmp_path / "y.npz", "samples.npy", old, new)
        with pytest.raises(ValueError, match=r"y\.npz is damaged"):
            cx.load(tmp_path / "y")

"""The hot loops of the CUDA kernels keep to their budget of instructions and loads in flight.

`sass_budget.json` names them: `find` tells a loop of a kernel from its others by counts that
`python -m tests.native.sass SOURCE` prints, `most` and `least` bound other counts. None of them may
call a function or use local memory. Needs nvcc and nvdisasm, and no GPU.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
from tests.native import sass
from tests.native.cuda_resources import nvcc

BUDGET = json.loads(pathlib.Path(__file__).with_name("sass_budget.json").read_text())

needs_nvdisasm = [
    pytest.mark.nvcc,
    pytest.mark.skipif(
        (nvcc() is None or sass.nvdisasm() is None)
        and os.environ.get("CURVAX_REQUIRE_NVCC") != "1",
        reason="nvcc or nvdisasm is not installed",
    ),
]


def budgeted():
    for source, kernels in BUDGET.items():
        for kernel in kernels:
            yield pytest.param(source, kernel, marks=needs_nvdisasm)


def hot_loops(source, kernel):
    """The loops that the budget names."""
    summaries = [loop.summary() for loop in sass.kernels(source)[kernel] if loop.innermost]
    found = {}
    for name, entry in BUDGET[source][kernel].items():
        matching = [
            each
            for each in summaries
            if all(each.get(op, 0) == count for op, count in entry["find"].items())
        ]
        assert len(matching) == 1, f"{kernel}: {len(matching)} loops are like {name}"
        found[name] = matching[0]
    return found


@pytest.mark.parametrize(("source", "kernel"), [*budgeted()])
def test_hot_loops_keep_to_their_budget(source, kernel):
    for name, found in hot_loops(source, kernel).items():
        entry = BUDGET[source][kernel][name]
        assert not {"CALL", "LDL", "STL"} & set(found), f"{kernel}, {name}: {found}"
        for op, most in entry.get("most", {}).items():
            assert found.get(op, 0) <= most, f"{kernel}, {name}: {found}"
        for op, least in entry.get("least", {}).items():
            assert found.get(op, 0) >= least, f"{kernel}, {name}: {found}"


@pytest.mark.parametrize("source", [pytest.param("softmax_ce", marks=needs_nvdisasm)])
def test_a_product_takes_110_instructions_for_four_elements(source):
    found = hot_loops(source, "SoftmaxCeRow<float, false>")
    assert set(found) == {"logits", "exponentials", "product"}
    # A load of 128 bits is four elements.
    assert sum(each["instructions"] / each["LDG.128"] for each in found.values()) <= 110


LISTING = """
\t.section\t.text._Z1kv,"ax",@progbits
_Z1kv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x200] ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   FADD R5, R5, R20 ;
        /*0060*/                   LDG.E.128 R12, desc[UR4][R2.64+0x400] ;
        /*0070*/                   FFMA R9, R8, R13, R6 ;
.L_x_2:
        /*0080*/                   STS.64 [R3], R14 ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   BRA P2, `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
"""


def test_loops_of_a_listing():
    (body,) = sass.parse(LISTING).values()
    assert len(body) == 13
    outer, inner = sass.loops(body)
    assert (outer.innermost, inner.innermost) == (False, True)
    assert (len(outer), len(inner)) == (10, 8)
    # The first load is waited for before the third is asked for.
    assert inner.summary() == {
        "instructions": 8,
        "in_flight": 2,
        "LDG.128": 3,
        "STS.64": 1,
        "FFMA": 1,
    }

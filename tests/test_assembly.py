"""What is read off assembly and machine code: accesses and their masks, exactness, the usual way
and its least time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onepass.app.explain.gpu_assembly import read_amdgcn, read_ptx
from onepass.app.explain.sass import Chip, bound, fast_path


def test_accesses_are_read_off_the_assembly() -> None:
    listing = read_ptx(
        """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.b32 { %r5 }, [ %rd2 + 0 ];
        @!%p2 ld.global.L1::evict_first.v2.b32 { %r5, %r6 }, [ %rd2 + 0 ];
        ld.param.b64 %rd1, [pass_0_param_0]; // ld.global.b64
        ld.local.b32 %r1, [%rd9];
        st.global.v2.b64 [ %rd3 + 0 ], { %rd4, %rd5 };
        @%p1 st.global.b16 [ %rd3 + 0 ], { %rs4 };
        mul.rn.f32 %r1, %r2, %r3; mul.wide.s32 %rd1, %r1, 4; mad.lo.s32 %r1, %r2, %r3, %r4;
        div.rn.f32 %r1, %r2, %r3;
        mul.f32 %r1, %r2, %r3; fma.rn.f64 %rd1, %rd2, %rd3, %rd4; div.full.f32 %r1, %r2, %r3;
        sqrt.approx.ftz.f32 %r1, %r2;
        """
    )
    assert (listing.loads, listing.masked_loads) == ({128: 1}, {32: 1, 64: 1})
    assert (listing.stores, listing.masked_stores) == ({128: 1}, {16: 1})
    assert (listing.fused, listing.approximate, listing.flushing, listing.local) == (2, 2, 1, 1)
    listing = read_amdgcn(
        """
        global_load_dwordx4 v[0:3], v[4:5], off
        buffer_load_ushort v1, v2, s[4:7], 0 offen
        buffer_store_b64 v[1:2], v3, s[4:7], 0 offen
        scratch_store_dword off, v1, s32 ; 4-byte Folded Spill
        .amdhsa_float_denorm_mode_32 3
        """,
        "%1 = call float @llvm.fma.f32(float %2, float %3, float %4)\n%5 = fmul contract float %1, "
        "%2",
    )
    assert (listing.loads, listing.stores) == ({128: 1, 16: 1}, {64: 1})
    assert (listing.fused, listing.approximate, listing.flushing, listing.local) == (2, 0, 0, 1)


SASS = """
        .global         pass_0
pass_0:
.text.pass_0:
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/               @P1 EXIT ;
        /*0020*/               @P0 BRA `(.L_x_9) ;
{loop}
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   MUFU.RSQ R9, R32 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/                 CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   FMUL.FTZ R3, R32, R9 ;
        /*0090*/                   FFMA R9, R2, R9, R3 ;
        /*00a0*/                   FFMA R9, R2, R9, R3 ;
        /*00b0*/                   FFMA R9, R2, R9, R3 ;
.L_x_3:
        /*00c0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
{back}
        /*00d0*/                   EXIT ;
.L_x_9:
        /*00e0*/              @!P4 LDG.E R3, desc[UR4][R60.64] ;
        /*00f0*/              @!P4 STG.E desc[UR4][R60.64], R3 ;
        /*0100*/                   EXIT ;
        .type           $__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath,@function
        /*0110*/                   RET.REL.NODEC R40 `(pass_0) ;
"""


def test_the_usual_way_through_machine_code() -> None:
    way = fast_path(SASS.format(loop="", back=""), "pass_0")
    assert (len(way.instructions), way.loads, way.stores, way.is_loop) == (
        12,
        {64: 1, 128: 1},
        {128: 1},
        False,
    )
    assert not any(op.startswith("CALL") for op in way.instructions)
    looped = SASS.format(loop=".L_x_1:", back="        /*00c8*/               @P2 BRA `(.L_x_1) ;")
    way = fast_path(looped, "pass_0")
    assert (len(way.instructions), way.loads, way.stores, way.is_loop) == (
        9,
        {128: 1},
        {128: 1},
        True,
    )
    with pytest.raises(ValueError, match="has no kernel pass_1"):
        fast_path(looped, "pass_1")


def test_the_scarcest_resource_is_the_bound() -> None:
    way = fast_path(SASS.format(loop="", back=""), "pass_0")
    chip = Chip("one lane each", multiprocessors=1, clock=1e9, bandwidth=1e9, schedulers=1, lanes=1)
    least = bound(way, 4, 8, chip)
    assert (least.by, least.memory) == ("issue", pytest.approx(8e-9))
    assert least.arithmetic == pytest.approx(12 / 4 * 1e-9)
    least = bound(way, 4, 8, replace(chip, lanes=1024))
    assert (least.by, least.arithmetic) == ("special functions", pytest.approx(1 / 16 / 4 * 1e-9))

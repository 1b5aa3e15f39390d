"""The scan of registers on machine code of four versions of Triton, and on faults put into code that has none."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from rpsft_kernels.ops.triton.machine_code.cubin import nvidia_tools
from rpsft_kernels.ops.triton.machine_code.register_hazards import find_hazards, scan_cubin
from sass_text import BROKEN, KERNELS, TRITONS, cubin, put, text_of

pytestmark = pytest.mark.xdist_group("aot")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("version", TRITONS)
def test_which_versions_break_the_rule(version: str, kernel: str) -> None:
    text = text_of(version, kernel)
    assert "HGMMA" in text
    found = find_hazards(text)
    assert bool(found) == (kernel in BROKEN[version])
    for each in found:
        assert re.match(rf"{kernel}_kernel: .* at 0x\w+ writes R[\dR, -]+ while HGMMA\S+ .* at 0x\w+ .*may still", each)


# In the inner loop of this kernel two groups are pending, of two products each, A in R152 to R175:
#     HGMMA R160, HGMMA R164 gsb0, DEPBAR 1, HGMMA R152, HGMMA R156 gsb0, DEPBAR 1, and back.
GOOD = text_of("3.9.0", "project")
FIRST, SECOND = r"HGMMA.* R24, R160, .*R24 ;", r"HGMMA.* R24, R156, .*gsb0 ;"
DEPBAR = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1"


def test_the_good_kernel_is_as_the_faults_take_it_to_be() -> None:
    assert find_hazards(GOOD) == []
    assert [len(re.findall(each, GOOD)) for each in (FIRST, SECOND, DEPBAR)] == [1, 1, 2]
    assert find_hazards(put(GOOD, "IMAD.MOV.U32 R199, RZ, RZ, RZ", behind=SECOND)) == []
    # Behind the second wait the first group is over.
    assert find_hazards(put(GOOD, "LDSM.16.M88.4 R160, [R0]", behind=DEPBAR, which=1)) == []


@pytest.mark.parametrize(
    ("text", "writes"),
    [
        # A register of the very next instruction.
        (put(GOOD, "MOV R156, RZ", behind=SECOND), "MOV R156"),
        # The width of a load that begins before it reaches the register.
        (put(GOOD, "LDS.128 R158, [R0]", behind=DEPBAR), "LDS.128 R158"),
        (put(GOOD, "LDS.64 R158, [R0]", behind=DEPBAR), None),
        # Two waits on, the newest group is pending still: around the loop.
        (put(GOOD, "LDSM.16.M88.4 R152, [R0]", behind=DEPBAR, which=1), "LDSM.16.M88.4 R152"),
        (put(GOOD, "LDSM.16.M88.4 R152, [R0]", before=r"LDSM.16.M88.4 R160, \[R0"), "LDSM.16.M88.4 R152"),
        # The wait taken away, or weaker.
        (re.sub(DEPBAR, "WARPGROUP.ARRIVE", GOOD, count=1), "while HGMMA"),
        (re.sub(DEPBAR, "WARPGROUP.DEPBAR.LE gsb0, 0x2", GOOD), "LDSM"),
        (re.sub(DEPBAR, "@P3 WARPGROUP.DEPBAR.LE gsb0, 0x1", GOOD), "LDSM"),
        # Accumulators before the last wait, and where it is missing.
        (put(GOOD, "FADD R2, R151, R2", behind=DEPBAR, which=1), "reads R151"),
        (put(GOOD, "STS.128 [R2], R148", behind=DEPBAR), "reads R148-R151"),
        (GOOD.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.ARRIVE"), "reads R"),
        # On the path on which the loop spins for its data.
        (put(GOOD, "MOV R156, RZ", behind=r"^\.L_x_14:"), "MOV R156"),
        (put(GOOD, "@P0 MOV R156, RZ", behind=r"^\.L_x_15:"), "@P0 MOV R156"),
        # A group that nothing ends.
        (GOOD.replace(", gsb0 ;", " ;"), "no wait covers a group that has not ended"),
        (put(GOOD, "BRX R2 -0x40", behind=SECOND), "goes where cannot be told"),
        (put(GOOD, "FROB R2", behind=SECOND), "not known"),
    ],
)
def test_a_fault_put_into_it_is_found(text: str, writes: str | None) -> None:
    found = find_hazards(text)
    if writes is None:
        assert found == []
    else:
        assert any(writes in each for each in found)


def test_a_function_that_is_called_inside_the_loop() -> None:
    def calling(body: str) -> str:
        text = put(GOOD, "MOV R199, 32@lo((project_kernel + .L_x_back@srel))", behind=SECOND)
        text = put(text, "CALL.REL.NOINC `($helper)", behind="MOV R199")
        text = put(text, ".L_x_back:", behind="CALL.REL")
        text = put(text, "$helper:", before="NOP;")
        text = put(text, body, behind=r"^\$helper:")
        return put(text, "RET.REL.NODEC R198 `(project_kernel)", behind=re.escape(body) + " ;")

    assert find_hazards(calling("FADD R197, R197, R196")) == []
    (found,) = find_hazards(calling("FADD R156, R197, R196"))
    assert "FADD R156, R197, R196" in found
    assert "writes R156 while" in found


def test_without_a_disassembler_it_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = cubin("3.9.0", "pull")
    with pytest.raises(ValueError, match=r"nvdisasm cannot read kernel\.cubin"):
        scan_cubin(image[:1000])
    tool = nvidia_tools() / "nvdisasm"
    monkeypatch.setattr("rpsft_kernels.ops.triton.machine_code.cubin.nvidia_tools", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"nvdisasm, .* is not found: .*pip install triton.*TRITON_NVDISASM_PATH"):
        scan_cubin(image)
    monkeypatch.setenv("TRITON_NVDISASM_PATH", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"TRITON_NVDISASM_PATH: '.*absent' is no program"):
        scan_cubin(image)
    monkeypatch.setenv("TRITON_NVDISASM_PATH", str(tool))
    assert scan_cubin(image) == []
    # One of CUDA's, among the commands.
    monkeypatch.delenv("TRITON_NVDISASM_PATH")
    shutil.copy(tool, tmp_path / "nvdisasm")
    assert scan_cubin(image) == []

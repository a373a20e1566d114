"""Plans on disk: bit for bit, whole or not at all, and never believed when damaged."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.tiny import calibrated, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import nbl_compiler as nbl
from nbl_compiler import plan_file
from nbl_compiler.errors import PlanFormatError
from nbl_compiler.fingerprint import Sketch

floats = st.floats(width=64)  # NaN and infinities too
details = st.dictionaries(
    st.text(max_size=5), st.one_of(floats, st.integers(), st.text(max_size=5), st.booleans())
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]))
    seed = draw(st.integers(0, 99))
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).reshape(shape)  # any bits, NaN payloads as well


@st.composite
def plans(draw: st.DrawFn) -> nbl.Plan:
    names = draw(st.lists(st.text("abc.#/0é", min_size=1, max_size=8), unique=True, max_size=3))
    sites = tuple(
        nbl.Site(
            name,
            draw(st.sampled_from(["attention", "ffn"])),
            draw(st.sampled_from(["rewritten", "kept", "rejected"])),
            draw(st.text(max_size=10)),
            draw(floats), draw(floats), draw(floats),
            draw(st.dictionaries(st.sampled_from(["weight", "bias", "u"]), tensors(), max_size=2)),
            draw(details),
        )
        for name in names
    )  # fmt: skip
    peaks = draw(st.none() | st.tuples(floats, floats))
    sketch = Sketch((2, 3), "float32", draw(floats), draw(floats), peaks)
    return nbl.Plan(sites, (sketch,), draw(st.text(max_size=5)), {"seed": 0, "layers": [1, "a"]})


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@given(plans())
def test_a_plan_survives_bit_for_bit(tmp_path: Path, plan: nbl.Plan) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    loaded = nbl.Plan.load(path)
    assert loaded.digest == plan.digest
    assert repr(loaded.header()) == repr(plan.header())  # repr tells NaN from NaN
    assert loaded.tensors().keys() == plan.tensors().keys()
    for name, tensor in plan.tensors().items():
        other = loaded.tensors()[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert bits(tensor) == bits(other)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


@given(plans())
def test_the_header_is_strict_json(plan: nbl.Plan) -> None:
    data = plan_file.to_bytes(plan)
    size = int.from_bytes(data[:8], "little")
    outer = strict_json(data[8 : 8 + size].decode())
    header = strict_json(outer["__metadata__"]["nbl_plan"])
    assert header["version"] == (1 if plan.fingerprint[0].peaks is None else 3)
    assert len(header["digest"]) == 64
    assert [site["name"] for site in header["sites"]] == [site.name for site in plan.sites]


@given(plans(), st.data())
def test_the_digest_covers_everything(plan: nbl.Plan, data: st.DataObject) -> None:
    changes: list[nbl.Plan] = [replace(plan, model=plan.model + "x")]
    for i, site in enumerate(plan.sites):
        changed = [replace(site, reason=site.reason + "x"), replace(site, nmse=0.123456)]
        changed += [
            replace(site, tensors={**site.tensors, key: torch.full((1, 2), 0.5)})
            for key in site.tensors
        ]
        changes += [
            replace(plan, sites=(*plan.sites[:i], other, *plan.sites[i + 1 :])) for other in changed
        ]
    assert data.draw(st.sampled_from(changes)).digest != plan.digest


@pytest.fixture(scope="module")
def real() -> nbl.Plan:
    return calibrated(tiny(layers=1), count=1)


def test_a_calibrated_plan_is_a_plain_safetensors_file(real: nbl.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    real.save(path)
    (site,) = real.rewritten
    with safe_open(path, framework="pt") as file:
        names = ("weight", "bias", "input_mean", "input_scale")
        assert set(file.keys()) == {f"{site.name}/{name}" for name in names}
        assert torch.equal(file.get_tensor(f"{site.name}/weight"), site.tensors["weight"])
    assert b"pickle" not in path.read_bytes()
    assert str(nbl.Plan.load(path)) == str(real)


@pytest.fixture(scope="module")
def content() -> bytes:
    """The content of a small plan's file."""
    site = nbl.Site(
        "m.0", "attention", "rewritten", "r", 0.5, float("nan"), float("inf"),
        {"weight": torch.randn(3, 2), "bias": torch.randn(3)}, {"input": "normed"},
    )  # fmt: skip
    return plan_file.to_bytes(nbl.Plan((site,), (Sketch((3, 2), "float32", 1.0, 2.0),), "model"))


def test_a_file_truncated_anywhere_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(PlanFormatError, match=r"plan\.safetensors"):
            nbl.Plan.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(PlanFormatError):
        nbl.Plan.load(path)


@settings(max_examples=1500)
@given(st.data())
def test_a_file_edited_anywhere_is_refused(content: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != content[place]))
    edited = content[:place] + bytes([byte]) + content[place + 1 :]
    with suppress(PlanFormatError):
        plan = plan_file.from_bytes(edited)
        # White space between JSON's tokens, say: nothing that means anything.
        assert plan_file.to_bytes(plan) == content


def test_every_edited_tensor_byte_is_refused(content: bytes) -> None:
    for place in range(len(content) - 36, len(content)):  # [3, 2] and [3] in float32
        edited = bytearray(content)
        edited[place] ^= 1
        with pytest.raises(PlanFormatError, match="edited after it was written; calibrate again"):
            plan_file.from_bytes(bytes(edited))


def rewritten_header(content: bytes, **changes: Any) -> bytes:
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    header = {**json.loads(metadata["nbl_plan"]), **changes}
    text = json.dumps({k: v for k, v in header.items() if v is not None})
    return safetensors.torch.save(safetensors.torch.load(content), metadata={"nbl_plan": text})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 5}, "is a plan of version 5; this release reads versions up to 4: calibrate"),
        ({"version": "1"}, "is a plan of version 1; this release"),
        ({"version": None}, "header of .* is damaged"),
        ({"sites": None}, "header of .* is damaged"),
        ({"sites": 3}, "header of .* is damaged"),
        ({"sites": [{"name": "m.0"}]}, "header of .* is damaged"),
        ({"sites": []}, "edited after it was written"),
        ({"fingerprint": [[1]]}, "header of .* is damaged"),
        ({"fingerprint": []}, "edited after it was written"),
        ({"digest": None}, "header of .* is damaged"),
        ({"model": "other"}, "edited after it was written"),
    ],
)
def test_headers_of_another_make(content: bytes, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanFormatError, match=message):
        plan_file.from_bytes(rewritten_header(content, **changes))


def test_tensors_of_no_site_are_an_edit(content: bytes) -> None:
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    extra = {**safetensors.torch.load(content), "m.1/weight": torch.zeros(2)}
    with pytest.raises(PlanFormatError, match="edited"):
        plan_file.from_bytes(safetensors.torch.save(extra, metadata=metadata))


@pytest.mark.parametrize("header", ["", "{", "[]", "null", '{"version": 1}', "7", '"text"'])
def test_a_header_that_is_none(header: str) -> None:
    data = safetensors.torch.save({"a/b": torch.zeros(1)}, metadata={"nbl_plan": header})
    with pytest.raises(PlanFormatError, match=r"header of .* is damaged"):
        plan_file.from_bytes(data)


def test_a_models_weights_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(PlanFormatError, match="holds no nbl plan; is it a model's weight file"):
        nbl.Plan.load(path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.pt"
    torch.save({"plan": 1}, path)
    with pytest.raises(PlanFormatError, match="not a whole safetensors file"):
        nbl.Plan.load(path)


@pytest.mark.parametrize("make", ["missing", "folder"])
def test_there_is_no_such_file(tmp_path: Path, make: str) -> None:
    path = tmp_path / "plan.safetensors"
    if make == "folder":
        path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no plan at .*; write one with plan\.save"):
        nbl.Plan.load(path)


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failed_write_leaves_the_old_file(
    real: nbl.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "plan.safetensors"
    nbl.Plan(model="old").save(path)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        real.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_plan_replaces_an_old_one_and_has_ordinary_rights(real: nbl.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    nbl.Plan(model="old").save(str(path))
    real.save(path)
    assert nbl.Plan.load(str(path)).digest == real.digest
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["plain", path.name]


def test_a_missing_folder_is_the_users_to_make(real: nbl.Plan, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        real.save(tmp_path / "missing" / "plan.safetensors")


def test_a_plan_answers_by_name(real: nbl.Plan) -> None:
    name = real.sites[0].name
    assert real.site(name) is real.sites[0]
    with pytest.raises(nbl.errors.ConfigError, match=f"no site 'elsewhere'; it has {name}"):
        real.site("elsewhere")


def test_a_changed_copy_does_not_share_cast_tensors(real: nbl.Plan) -> None:
    (site,) = real.rewritten
    like = torch.zeros(1, dtype=torch.bfloat16)
    real.tensor(site, "bias", like)
    zero = replace(site, tensors={key: torch.zeros_like(t) for key, t in site.tensors.items()})
    other = replace(real, sites=(zero,))
    assert not other.tensor(zero, "bias", like).any()
    assert real.tensor(site, "bias", like) is real.tensor(site, "bias", like)


def test_cast_tensors_outlive_the_mode_they_were_made_in(real: nbl.Plan) -> None:
    (site,) = real.rewritten
    with torch.inference_mode():
        cast = real.tensor(site, "weight", torch.zeros(1, dtype=torch.float16))
    assert not cast.is_inference()

"""Machines that nobody has here: their names, what is understood and refused, and what is said of programs that were
compiled for them. What needs a compiler's package is slow."""

import importlib.metadata

import pytest

from parallel.cost import hardware, targets

CHIPS = hardware.catalogue()


def target(text):
    return targets.parse(text, CHIPS)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5p-128", "v5p-128 = 64 chips 4×4×4, wrapped, 95.7 GiB each"),
        ("v5p:4x4x4", "v5p:4x4x4 = 64 chips 4×4×4, wrapped, 95.7 GiB each"),
        ("2xv5p-64", "2xv5p-64 = 2 slices of 32 chips 2×4×4, not wrapped, 95.7 GiB each"),
        ("v5p-2304", "v5p-2304 = 1152 chips 8×12×12, wrapped, 95.7 GiB each"),
        ("v5litepod-16", "v5litepod-16 = 16 chips 4×4, not wrapped, 15.8 GiB each"),
        ("v6e-128", "v6e-128 = 128 chips 8×16, wrapped along 16, 31.2 GiB each"),
        ("4xv5e-256", "4xv5e-256 = 4 slices of 256 chips 16×16, wrapped, 15.8 GiB each"),
        ("v6e-1", "v6e-1 = 1 chip 1×1, not wrapped, 31.2 GiB each"),
        ("h100:8", "h100:8 = one host of 8 NVIDIA H100 80GB HBM3, 79.1 GiB each, of which a program gets 90%"),
        ("2xb200:4x8", "2xb200:4x8 = 2 sites of 4 hosts of 8 NVIDIA B200, 178.4 GiB each, of which a program gets 90%"),
    ],
)
def test_a_machine_is_read_from_its_name(text, said, monkeypatch):
    for key in targets.FRACTION_KEYS:
        monkeypatch.delenv(key, raising=False)
    assert target(text).said() == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5-128", "did you mean v5p-128"),
        ("h1000:8", "did you mean h100:8"),
        ("gb200:4", "gb200 is known by its speed alone: did you mean b200:8"),
        ("", "is no chip that is known"),
        ("128x8", "is no chip that is known"),
        ("h100", "as in h100:8"),
        ("h100:0", "as in h100:8"),
        ("0xh100:8", "as in h100:8"),
        ("h100-8", "h100:4x8 (hosts × devices of each)"),
        ("h100:16", "h100:2x8"),
        ("v5p-100", "v5p-64 (32 chips) and v5p-128 (64 chips)"),
        ("v5p-127", "v5p-64 (32 chips) and v5p-128 (64 chips)"),
        ("v5p:4x4", "has 3 sides, as 64 chips are 4×4×4"),
        ("v5p:4x4x5", "v5p-128 (64 chips)"),
        ("v5e:8x3", "v5e-16 (16 chips) and v5e-32 (32 chips)"),
        ("v5e-1024", "the largest is v5e-256. 4xv5e-256"),
        ("v6e:16x32", "the largest is v6e-256. 2xv6e-256"),
        ("h100:8+l4:4", "+ joins unequal sites"),
    ],
)
def test_what_is_no_machine_is_refused_with_the_nearest_one(text, said):
    with pytest.raises(ValueError) as error:
        target(text)
    assert str(error.value).startswith(f"target={text}: ") and said in str(error.value)


def test_every_slice_that_is_named_in_a_refusal_can_be_had():
    for name in ("v4", "v5e", "v5p", "v6e"):
        chip = CHIPS[name]
        for chips in targets.sizes(chip):
            found = target(f"{name}-{chips * chip.cores}")
            assert found.chips == chips and len(found.sides) == chip.sides
            assert target(f"{name}:{'x'.join(map(str, found.sides))}").sides == found.sides


def test_links_wrap_around_where_a_slice_has_them():
    """Clouds' topologies: v5e and v6e along sides of 16, v5p from one cube of 64 chips."""
    wraps = lambda text: [target(text).wrap, target(text).hosts]
    assert wraps("v5e-64") == [(False, False), 16] and wraps("v5e-128") == [(False, True), 32]
    assert wraps("v6e-256") == [(True, True), 64] and wraps("v5p-64") == [(False,) * 3, 8]
    assert wraps("v5p-128") == [(True,) * 3, 16] and wraps("h100:4x8") == [(), 4]


# ── the catalogue ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_chip_that_can_be_rented_has_what_is_counted_with():
    for chip in CHIPS.values():
        assert chip.bf16 and chip.source
        if chip.largest:
            assert chip.memory > 10 * hardware.GiB and chip.bandwidth > 1e11 and chip.outside
            assert bool(chip.link) == chip.is_tpu and bool(chip.inside) != chip.is_tpu
            assert chip.peak("fp8") >= chip.peak("bf16") == chip.bf16


def test_a_file_of_the_user_adds_chips_and_changes_values(tmp_path):
    file = tmp_path / "chips.toml"
    file.write_text('[h100]\noutside = 25e9\n[mine]\nkind = "MINE 1"\nbf16 = 1e15\nmemory = 64000000000\nlargest = 4\n')
    found = hardware.catalogue(str(file))
    assert found["h100"].outside == 25e9 and found["h100"].bf16 == CHIPS["h100"].bf16
    assert targets.parse("mine:2x4", found).chips == 8 and "mine" not in CHIPS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[h100\n", "chips.toml"),
        ("[h100]\nspeed = 1", "[h100] has 'speed'; a chip has kind, bf16"),
        ("[h100]\nbf16 = 0", "bf16=0: expected a number above 0"),
        ("[h100]\nmemory = 1.5", "memory=1.5: expected a whole number above 0"),
        ("[h100]\nbf16 = '1'", "bf16='1': expected a number above 0"),
        ("[h100]\nkind = 1", "kind=1: expected text in quotes"),
        ("[mine]\nbf16 = 1", "[mine] is a new chip, which needs at least kind and bf16"),
        ("h100 = 3", "h100=3 stands outside of a chip's table"),
    ],
)
def test_a_wrong_file_of_the_user_is_refused_by_name(text, said, tmp_path):
    file = tmp_path / "chips.toml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        hardware.catalogue(str(file))
    assert str(file) in str(error.value) and said in str(error.value)


# ── compilers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "installed", "said"),
    [
        ("h100", {}, "needs jax-cuda13-plugin, which is not installed: `pip install --no-deps jax-cuda13-plugin==9.9"),
        ("h100", {"jax-cuda13-plugin": "9.9"}, "needs jax-cuda13-pjrt, which is not installed"),
        ("a100", {"jax-cuda13-plugin": "9.8", "jax-cuda13-pjrt": "9.9"}, "jax-cuda13-plugin 9.8 is not of JAX 9.9"),
        ("v5p", {}, "needs libtpu, which is not installed: `pip install --no-deps libtpu`"),
        ("v5e", {"libtpu": "0.0.9"}, "libtpu 0.0.9 is not of JAX 9.9, which wants 0.0.10"),
        ("l4", {}, "XLA has no description of l4"),
    ],
)
def test_a_compiler_that_is_missing_or_of_another_jax_is_told_with_the_command(name, installed, said, monkeypatch):
    def version(package):
        if package not in installed | {"jax": "9.9"}:
            raise importlib.metadata.PackageNotFoundError(package)
        return ({"jax": "9.9"} | installed)[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ['libtpu==0.0.10.*; extra == "tpu"', "numpy"])
    with pytest.raises((ImportError, ValueError)) as error:
        targets.check_compiler(CHIPS[name])
    assert said in str(error.value)


def test_a_newer_libtpu_and_the_same_plugins_will_do(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.0.52" if package == "libtpu" else "9.9")
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ['libtpu==0.0.50.*; extra == "tpu"'])
    targets.check_compiler(CHIPS["v5p"])
    targets.check_compiler(CHIPS["h100"])


def test_a_description_for_xla_is_whole():
    for name in ("h100", "h200", "a100", "a100-40gb", "b200"):
        text = targets.description(CHIPS[name])
        assert text.count("{") == text.count("}") and f"device_memory_size: {CHIPS[name].memory}" in text
        for key in ("core_count", "memory_bandwidth", "cuda_compute_capability", "shared_memory_per_block_optin"):
            assert f"{key}" in text

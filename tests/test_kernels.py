"""What a chip's name says of it: which attention kernel fits (model/kernels.py), its speed (parallel/cost/hardware.py);
and the look-up of embeddings in each device's own rows."""

import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model import attention, kernels
from parallel.cost.hardware import peak_flops
from parallel.layout import mesh as meshes
from parallel.layout import rules
from parallel.layout.rules import Constrain
from recipes import language
from runtime.config import UsageError

H100, A100, V100, V5E = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "Tesla V100-SXM2-16GB", "TPU v5 lite"
BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


def choose(asked="auto", T=256, K=64, dtype=BF16, kind=H100, masked=False):
    return kernels.choose(asked, (8, T, 4, K), dtype, kind, masked)


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("cudnn", {}),
        ("cudnn", {"K": 256}),
        ("cudnn", {"T": 100}),
        ("cudnn", {"K": 128, "kind": A100}),
        ("cudnn", {"kind": "NVIDIA L4"}),
        ("cudnn", {"kind": "NVIDIA B200"}),
        ("reference", {"K": 20}),  # quickstart's
        ("reference", {"K": 264}),
        ("reference", {"K": 256, "kind": A100}),
        ("reference", {"dtype": F32}),
        ("reference", {"masked": True}),
        ("reference", {"kind": V100}),
        ("reference", {"kind": "AMD Instinct MI300X"}),
        ("splash", {"kind": V5E, "K": 20}),
        ("splash", {"kind": V5E, "masked": True}),
        ("splash", {"kind": "TPU v4", "dtype": F32}),
        ("reference", {"kind": V5E, "T": 192}),
        ("reference", {"kind": "cpu"}),
    ],
    ids=str,
)
def test_auto_takes_the_first_kernel_that_fits_and_says_why_not_the_others(kernel, case):
    name, passed = choose(**case)
    assert name == kernel
    before = list(kernels.FITS)[: list(kernels.FITS).index(kernel)]
    assert set(before) <= set(passed) and all(passed.values())


def test_a_kernel_asked_for_by_name_that_does_not_fit_is_refused_with_the_reason():
    assert choose("reference")[0] == "reference" and choose("cudnn")[0] == "cudnn"
    with pytest.raises(
        ValueError, match=r"attention=cudnn: .*model.head_dim=20.*attention=auto \(here that is reference\)"
    ):
        choose("cudnn", K=20)
    with pytest.raises(ValueError, match=r"attention=splash: .*128 positions .*, not 192"):
        choose("splash", T=192, kind=V5E)
    with pytest.raises(UsageError, match="GPUs, not on cpu"):
        helpers.build(helpers.tiny(compute__attention="cudnn"), (1, 1, 1))


@pytest.mark.parametrize("T", [32, 128, 192, 384])
def test_splash_fits_what_jax_itself_lets_through(T):
    mesh = meshes.build({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    x = jax.ShapeDtypeStruct((2, T, 2, 16), BF16)
    run = lambda q: jax.grad(
        lambda q: attention.KERNELS["splash"](q, q, q, None, None, Constrain(mesh)).astype(F32).sum()
    )(q)
    try:
        jax.eval_shape(run, x)
        runs = True
    except (ValueError, NotImplementedError):
        runs = False
    assert (kernels.splash_fits(x.shape, BF16, V5E, False) is None) == runs


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2450),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v4 lite", 138),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
        ("NVIDIA L40", None),
        ("NVIDIA A1000", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("cpu", None),
    ],
)
def test_a_chip_is_known_by_whole_words_of_its_name(kind, teraflops):
    assert peak_flops(kind) == (teraflops and teraflops * 1e12)


@pytest.mark.parametrize(
    ("sizes", "position"), [((2, 2, 2), "learned"), ((2, 1, 4), "rope"), ((1, 4, 2), "learned")], ids=str
)
def test_the_look_up_in_ones_own_rows_is_a_look_up_and_so_is_its_gradient(sizes, position):
    """Against jnp.take on one device: the embeddings to the bit, their gradient to the order of its sums."""
    mesh = meshes.build(dict(zip(meshes.COMMON, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    model, _ = language.build_model(helpers.tiny(model__position=position), "cpu")
    draw = lambda seed, *shape: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    tables = {"embed": draw(0, 256, 64)} | ({"position": draw(1, 32, 64)} if position == "learned" else {})
    ids_RBT = np.random.default_rng(2).integers(0, 256, (sizes[0], 8, 32)).astype(np.int32)
    weight_RBTD = draw(3, *ids_RBT.shape, 64)
    at_BT = np.broadcast_to(np.arange(32, dtype=np.int32), ids_RBT.shape[1:])

    def own(tables, ids_BT, weight_BTD):
        x_BTD = model._embedded(tables, ids_BT, jnp.asarray(at_BT), Constrain(mesh))
        return jnp.sum(x_BTD * weight_BTD), x_BTD

    def plain(tables, ids_BT, weight_BTD):
        x_BTD = jnp.take(tables["embed"], ids_BT, axis=0)
        if position == "learned":
            x_BTD = x_BTD + jnp.take(tables["position"], at_BT, axis=0)
        return jnp.sum(x_BTD * weight_BTD), x_BTD

    def both(f, spmd, tables, *batch):
        every = jax.vmap(jax.grad(f, has_aux=True), in_axes=(None, 0, 0), spmd_axis_name=spmd)
        return jax.device_get(jax.jit(every, compiler_options=helpers.QUICKLY)(tables, *batch))

    sharded = {name: jax.device_put(x, NamedSharding(mesh, rules.spec(model.axes[name]))) for name, x in tables.items()}
    batch = [jax.device_put(x, NamedSharding(mesh, P("replica", "fsdp"))) for x in (ids_RBT, weight_RBTD)]
    grads_R, x_RBTD = both(own, "replica", sharded, *batch)
    wanted_R, wanted_RBTD = both(plain, None, tables, ids_RBT, weight_RBTD)
    assert (x_RBTD == wanted_RBTD).all()
    for name, wanted in wanted_R.items():
        assert abs(grads_R[name] - wanted).max() <= 1e-6 * abs(wanted).max(), name

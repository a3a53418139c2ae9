"""Options of XLA's compilers: the config's reach every program, in place of ours, and what a compiler does not know is
refused before anything is built."""

from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest

from recipes import describe, programs, xla
from runtime.config import UsageError


def test_they_reach_the_compiler_and_the_table(tmp_path):
    parts = helpers.build(
        helpers.tiny(compute__xla_options=f"xla_dump_to={tmp_path}, xla_dump_hlo_as_text=true"), (1, 1, 1)
    )
    assert parts.xla_options == {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there is not compiled
    try:
        programs.compile_init(parts)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    assert any("jit_init" in path.name for path in tmp_path.iterdir())
    assert ("XLA options", f"xla_dump_to={tmp_path}, xla_dump_hlo_as_text=True") in describe.model_rows(parts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("xla_of_nobody=3", "No such compile option: 'xla_of_nobody'"),
        ("xla_cpu_multi_thread_eigen=maybe", "'maybe' is not a valid bool value"),
        ("xla_cpu_multi_thread_eigen", "'xla_cpu_multi_thread_eigen' is not name=value"),
    ],
)
def test_what_a_compiler_does_not_know_is_one_sentence(text, said):
    with pytest.raises(UsageError, match="^compute.xla_options: ") as error:
        helpers.build(helpers.tiny(compute__xla_options=text), (1, 1, 1))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_ours_for_a_gpu_are_overridden_by_name():
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert xla.options("", mesh, is_small=True) == xla.GPU == {next(iter(xla.GPU)): 64}
    cpu = helpers.build(helpers.tiny(), (1, 1, 1)).mesh
    assert xla.options("", cpu, is_small=False) == {} and xla.options("", cpu, is_small=True) == xla.SMALL_ON_CPU
    assert xla.options("xla_cpu_multi_thread_eigen=true", cpu, is_small=True) == {"xla_cpu_multi_thread_eigen": True}

"""Compiled programs are kept on disk between processes, and counted while they are made."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmmr1_jax.runtime.compilation import CompilationCounter

COMPILE = """
import jax, jax.numpy as jnp
from lmmr1_jax.runtime.compilation import enable_compilation_cache
print(enable_compilation_cache())
jax.jit(lambda x: x * 2 + 1)(jnp.ones(3)).block_until_ready()
"""


def compile_in_a_process(**variables) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    environment = kept | {"JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    place = compile_in_a_process(XDG_CACHE_HOME=str(tmp_path / "xdg"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert place == str(tmp_path / "xdg" / "lmmr1_jax" / "xla")
    assert list((tmp_path / "xdg" / "lmmr1_jax" / "xla").iterdir())


def test_jaxs_own_variables_win(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert compile_in_a_process(XDG_CACHE_HOME=str(tmp_path / "xdg"), **own) == str(tmp_path / "mine")
    assert (tmp_path / "mine").exists() and not (tmp_path / "xdg").exists()
    off = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    assert compile_in_a_process(XDG_CACHE_HOME=str(tmp_path / "xdg"), **off) == "None"
    assert not (tmp_path / "xdg").exists()


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    compile_in_a_process(XDG_CACHE_HOME=str(tmp_path / "file"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")


@pytest.fixture
def counter():
    counter = CompilationCounter()
    yield counter
    counter.close()


def test_each_program_is_counted_once_by_its_name(counter):
    def triple(x):
        return x * 3

    program = jax.jit(triple)
    for size in (5, 5, 6, 5):
        program(np.ones(size, np.float32))
    assert counter.names == ["jit(triple)", "jit(triple)"]
    counter.restart()
    program(np.ones(5, np.float32))
    assert counter.count == 0


def test_a_closed_counter_counts_no_more():
    counter = CompilationCounter()
    counter.close()
    jax.jit(lambda x: x - 7)(np.ones(2, np.float32))
    assert counter.count == 0

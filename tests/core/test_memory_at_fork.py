"""The staging memory and children: a fork costs the parent nothing, and the child can end as it likes."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fork_makes_no_page_of_it_copy_on_write() -> None:
    page = resource.getpagesize()
    program = f"""
        import ctypes, mmap, os, resource, signal
        from supervise_core.memory import address_of, own_memory

        size = 64 << 20
        plain = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        ctypes.memset(address_of(plain), 1, size)
        kept = own_memory(size)

        def faults(view):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for at in range(0, size, {page}):
                view[at] = 2
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        child = os.fork()
        if not child:
            signal.pause()
        print(faults(plain), faults(kept))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    """
    plain, kept = map(int, run(program).split())
    assert plain > 1000, "the fork cost other memory nothing either: the test shows nothing"
    assert kept < plain / 20


def test_a_child_that_ends_like_a_program_takes_nothing_from_itself() -> None:
    program = """
        import os, sys
        from supervise_core.memory import own_memory

        kept = [own_memory(8 << 20) for _ in range(4)]
        kept[0][:3] = b"abc"
        child = os.fork()
        if not child:
            assert bytes(kept[0][:3]) == bytes(3), "empty"
            own = [bytearray(8 << 20) for _ in range(8)]
            kept.clear()
            for memory in own:
                memory[::4096] = bytes(len(memory[::4096]))
            sys.exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert bytes(kept[0][:3]) == b"abc"
    """
    run(program)


def test_a_child_that_goes_on_saving_begins_with_memory_of_its_own() -> None:
    program = """
        import os, sys
        import numpy as np
        from supervise_core.safetensors_format import parse
        from supervise_core.staging import Staging

        staging = Staging()

        def image():
            staging.put("model", {"w": np.arange(1000.0)})
            return b"".join(staging.snapshot().parts["model"].files[0].chunks())

        expected = image()
        child = os.fork()
        if not child:
            sys.exit(0 if image() == expected and "w" in parse(expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert image() == expected
    """
    run(program)

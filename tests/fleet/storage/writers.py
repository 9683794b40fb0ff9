"""Writers of a store in processes of their own, which are killed at a moment or at a step."""

import multiprocessing
import os
import signal
from pathlib import Path

from fleet.storage import collecting
from fleet.variants import Store
from tests.fleet.storage.stores import changed, exact_variant, small_base

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fleet.variants", "tests.fleet.storage.writers"])

STEPS = ("fsync", "ftruncate", "mkdir", "open", "posix_fallocate", "pwrite", "replace", "unlink")


def version_of(name, seed):
    """The variant `name` (v, w or x) as the writers below write it for the `seed`-th time."""
    base = small_base()
    values = changed(base, 3 * seed + "vwx".index(name))
    return *exact_variant(name, values, base, about={"seed": seed}), values


def add_versions(folder, said, first=1):
    """Replace the variant `v` again and again, and say each time that it is done."""
    store = Store(folder)
    said.send("ready")
    for seed in range(first, 10**6):
        variant, tensors, _ = version_of("v", seed)
        store.add(variant, tensors)
        said.send(seed)


def add_and_collect(folder, said):
    """Make garbage and collect it, again and again."""
    store = Store(folder)
    said.send("ready")
    for seed in range(1, 10**6):
        store.add_many(version_of(name, seed)[:2] for name in ("v", "w", "x"))
        store.remove("w")
        store.remove("x")
        store.gc()
        said.send(seed)


def killed_at(moment_seconds, write, folder):
    """Start `write`, kill it so long after it is ready; what it said before that."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=write, args=(folder, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    process.join(moment_seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    said = []
    while ours.poll():
        try:
            said.append(ours.recv())
        except EOFError:
            break
    return said


def add_sparse(folder):
    """Replace `v` in a pack of which gc needs a third only."""
    store = Store(folder)
    store.add_many(version_of(name, 2)[:2] for name in ("v", "w", "x"))
    store.remove("w")
    store.remove("x")


def add_small(folder):
    """`v` and two others in packs of their own, and no other pack but the base's."""
    store = Store(folder)
    for name in ("v", "w", "x"):
        store.add(*version_of(name, 2)[:2])
    store.gc()


def do_one(what, folder, at, before):
    """One change, killed before or in the middle of (a write), or after, its `at`-th step."""
    store = Store(folder)
    variant, tensors, _ = version_of("v", 2)
    if what == "merge":
        collecting.SMALL_PACKS = 4
    count = 0

    def watched(name, call):
        def step(*arguments, **named):
            nonlocal count
            count += 1
            number = count
            if number == at and before:
                if name == "pwrite":
                    descriptor, data, offset = arguments
                    call(descriptor, bytes(data)[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **named)
            finally:
                if number == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return step

    for name in STEPS:
        setattr(os, name, watched(name, getattr(os, name)))
    if what == "add":
        store.add(variant, tensors)
    else:
        store.gc()


def done_until(what, folder, at, before):
    """Do one change in a process that is killed at a step; whether it was."""
    process = CONTEXT.Process(target=do_one, args=(what, Path(folder), at, before))
    process.start()
    process.join()
    assert process.exitcode in {0, -signal.SIGKILL}
    return process.exitcode != 0

"""Never a bad TensorFlow checkpoint: damage is found out, the older one restored, and each logdir keeps to itself."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core.errors import AllCheckpointsDamagedError  # noqa: E402
from supervise_tf import Supervisor  # noqa: E402

v1 = tf.compat.v1

Harm = Callable[[Path, random.Random], None]
OURS = ("index", "data-00000-of-00001", "meta", "manifest.json")
THEIRS = ("index", "data-00000-of-00001")


def flip_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


HARMS: tuple[Harm, ...] = (flip_bit, flip_bit, truncate, delete)


class Program:
    """One graph, whose variables hold, after step n, the number n; run again and again."""

    def __init__(self, kind: str) -> None:
        resource = kind == "resource"
        self.graph = tf.Graph()
        with self.graph.as_default():
            zeros = v1.zeros_initializer()
            step = v1.get_variable("global_step", (), tf.int64, zeros, trainable=False, use_resource=resource)
            self.variables = [
                v1.get_variable(f"v{number}", shape, tf.float64, zeros, use_resource=resource)
                for number, shape in enumerate([(7, 3), (), (50,)])
            ]
            value = tf.cast(step, tf.float64) + 1
            assigns = [v1.assign(variable, tf.fill(variable.shape, value)) for variable in self.variables]
            with tf.control_dependencies(assigns):
                self.train = v1.assign_add(step, 1).op
            self.saver = v1.train.Saver(max_to_keep=3)
            v1.add_to_collection(v1.GraphKeys.SAVERS, self.saver)
            self.supervisor(None)  # the graph is whole, and finalized

    def supervisor(self, logdir: Path | None, **options: Any) -> Any:
        return Supervisor(self.graph, logdir=logdir, summary_op=None, summary_writer=None, **options)

    def run(self, logdir: Path, steps: int = 0) -> tuple[Any, int]:
        """Bring the model up, check that its values are those of its step, and train. The report, and that step."""
        with self.graph.as_default():
            sv = self.supervisor(logdir)
            with sv.managed_session() as sess:
                begun = int(sess.run(sv.global_step))
                for value in sess.run(self.variables):
                    assert (value == begun).all()
                for _ in range(steps):
                    assert not sv.should_stop()
                    sess.run(self.train)
        return sv.report, begun


@pytest.fixture(scope="module", params=["ref", "resource"])
def program(request: pytest.FixtureRequest) -> Program:
    return Program(request.param)


@pytest.fixture(scope="module")
def trained(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 0, 2 and 4."""
    logdir = tmp_path_factory.mktemp("trained") / "run"
    program.run(logdir, 2)
    program.run(logdir, 2)
    assert steps_in(logdir) == [0, 2, 4]
    return logdir


def steps_in(logdir: Path) -> list[int]:
    return sorted(int(index.stem.rpartition("-")[2]) for index in logdir.glob("model.ckpt-*.index"))


def contents(logdir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(logdir)): path.read_bytes()
        for path in sorted(logdir.rglob("*"))
        if path.is_file() and path.name.startswith(("model.ckpt", "checkpoint"))
    }


def set_aside(logdir: Path) -> set[str]:
    """The names of the checkpoints that were set aside."""
    return {directory.name for directory in (logdir / "set-aside").iterdir()}


@pytest.mark.campaign(small=20, soak=100)
@pytest.mark.parametrize("manifests", [True, False], ids=["ours", "without manifests"])
def test_tf_damage_is_found_and_the_older_one_restored(
    program: Program, trained: Path, tmp_path: Path, manifests: bool, count: int, seed: int
) -> None:
    chance = random.Random(f"{seed} {manifests}")
    for number in range(count):
        logdir = Path(shutil.copytree(trained, tmp_path / str(number)))
        if not manifests:
            for manifest in logdir.glob("*.manifest.json"):
                manifest.unlink()
        file = (OURS if manifests else THEIRS)[number % (4 if manifests else 2)]
        harm = HARMS[number // 4 % len(HARMS)]
        harm(logdir / f"model.ckpt-4.{file}", chance)
        what = f"{number}: {harm.__name__} {file}"
        report, begun = program.run(logdir)  # checks that the values are those of its step
        if begun == 4:  # nothing that is restored was harmed: TensorFlow's own checkpoint, as its checksums say
            unchanged = (harm, file) == (delete, "manifest.json") or (harm is flip_bit and not manifests)
            assert unchanged, what
        else:
            assert begun == 2, what
            assert report.restored == "model.ckpt-2", what
            assert steps_in(logdir) == [0, 2], what
            if (harm, file) != (delete, "index"):
                assert list(report.set_aside) == ["model.ckpt-4"], what
                assert report.set_aside["model.ckpt-4"], what
            if manifests or (harm, file) != (delete, "index"):  # what has neither index nor manifest is nothing
                assert set_aside(logdir) == {"model.ckpt-4"}, what
        shutil.rmtree(logdir)


@pytest.mark.parametrize("harm", [flip_bit, truncate, delete], ids=lambda harm: str(harm.__name__))
def test_all_damaged_is_an_error_at_every_start(program: Program, trained: Path, tmp_path: Path, harm: Harm) -> None:
    logdir = Path(shutil.copytree(trained, tmp_path / "run"))
    for step in (0, 2, 4):
        harm(logdir / f"model.ckpt-{step}.data-00000-of-00001", random.Random(step))
    for _ in range(2):
        with pytest.raises(AllCheckpointsDamagedError) as raised:
            program.run(logdir)
        assert sorted(raised.value.damaged) == ["model.ckpt-0", "model.ckpt-2", "model.ckpt-4"]
        assert all("data-00000-of-00001" in reason for reason in raised.value.damaged.values())


def test_an_unreadable_state_file_costs_nothing(program: Program, trained: Path, tmp_path: Path) -> None:
    for number, content in enumerate([b"", b"\xff\xfe nonsense {", b'model_checkpoint_path: "gone-7"', None]):
        logdir = Path(shutil.copytree(trained, tmp_path / str(number)))
        (logdir / "checkpoint").unlink()
        if content is not None:
            (logdir / "checkpoint").write_bytes(content)
        report, begun = program.run(logdir, 1)
        assert (begun, report.restored) == (4, "model.ckpt-4")
        assert tf.train.latest_checkpoint(str(logdir)) == str(logdir / "model.ckpt-5")


@pytest.mark.parametrize("how", ["copied", "renamed"])
def test_a_logdir_elsewhere_keeps_to_itself(program: Program, trained: Path, tmp_path: Path, how: str) -> None:
    original = Path(shutil.copytree(trained, tmp_path / "original"))
    before = contents(original)
    other = tmp_path / "other"
    if how == "copied":
        shutil.copytree(original, other)
    else:
        original.rename(other)
    _, begun = program.run(other, 1)
    assert begun == 4
    assert program.run(other, 1)[1] == 5
    assert steps_in(other) == [4, 5, 6]  # max_to_keep=3: removed there
    assert tf.train.latest_checkpoint(str(other)) == str(other / "model.ckpt-6")
    if how == "copied":
        assert contents(original) == before
        assert program.run(original)[1] == 4
    else:
        assert not original.exists()

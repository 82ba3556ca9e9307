"""The same state saved by other tools: PyTorch, safetensors, Orbax, Lightning, TensorFlow, as far as they are here.

Each is used as its documentation has it. Where a tool leaves the data to the page cache, ``torch.save`` and
``save_file`` get an fsync of ours, so that what is compared is durable; of those that save beside the loop it is only
said.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy
import safetensors.torch
import torch

from benchmarks.saving_state import UNIT, State


class Peer(ABC):
    """One tool. ``begin`` is what the loop waits for; then it trains on until ``is_done``."""

    name: ClassVar[str]
    needs: ClassVar[str | None] = None
    """The module without which it is left out."""
    synced: ClassVar[str] = "yes"
    """Whether the data is durable when it says that it is done."""

    def __init__(self, state: State, folder: Path) -> None:
        self._state = state
        self._root = folder
        self._round = 0
        self._path = folder / "peer-0"

    def prepare(self) -> None:
        """What is not timed, before each save."""
        self._round += 1
        self._path = self._root / f"peer-{self._round}"

    def clear(self) -> None:
        """Remove what was saved."""
        for path in self._root.glob("peer-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    @abstractmethod
    def begin(self) -> None:
        """Save, or begin to."""

    def is_done(self) -> bool:
        """Whether it says that the save has ended."""
        return True

    @abstractmethod
    def finish(self) -> None:
        """Wait until it says so."""

    @abstractmethod
    def load(self) -> Mapping[str, Any]:
        """What was saved, by the names of ``State.named``."""

    @property
    def step(self) -> int:
        """The step that a save would be of that began now."""
        return self._state.steps

    def each_step(self) -> None:
        """What this tool needs in each step, if the state that it saves is another than ours."""

    def close(self) -> None:
        """Let go of what it holds."""


class TorchSave(Peer):
    name = "torch.save + fsync"
    synced = "by us"

    def begin(self) -> None:
        torch.save(self._state.named(), self._path)
        _sync(self._path)

    def finish(self) -> None:
        pass

    def load(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = torch.load(self._path, weights_only=True)
        return found


class Safetensors(Peer):
    name = "safetensors save_file + fsync"
    synced = "by us"

    def begin(self) -> None:
        safetensors.torch.save_file(self._state.named(), self._path)
        _sync(self._path)

    def finish(self) -> None:
        pass

    def load(self) -> Mapping[str, Any]:
        return safetensors.torch.load_file(self._path)


class _Dcp(Peer):
    """``torch.distributed.checkpoint`` in one process."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self._future: Future[Any] | None = None

    def begin(self) -> None:
        import torch.distributed.checkpoint as dcp

        saving: Any = dcp.state_dict_saver.async_save(self._state.named(), checkpoint_id=self._path, **self._options())
        self._future = getattr(saving, "upload_completion", saving)

    def _options(self) -> dict[str, Any]:
        return {}

    def is_done(self) -> bool:
        return self._future is None or self._future.done()

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()

    def load(self) -> Mapping[str, Any]:
        import torch.distributed.checkpoint as dcp

        found = {name: torch.empty_like(tensor) for name, tensor in self._state.named().items()}
        dcp.state_dict_loader.load(found, checkpoint_id=self._path)
        return found


class DcpSave(_Dcp):
    name = "torch DCP save"

    def begin(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.state_dict_saver.save(self._state.named(), checkpoint_id=self._path)


class DcpAsync(_Dcp):
    name = "torch DCP async_save"


class DcpReused(_Dcp):
    name = "torch DCP async_save, reused stager"
    shared = False

    def __init__(self, state: State, folder: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(state, folder)
        self._stager = DefaultStager(StagingOptions(False, self.shared, False, False))

    def _options(self) -> dict[str, Any]:
        return {"async_stager": self._stager}

    def close(self) -> None:
        self._stager.close()


class DcpProcess(DcpReused):
    name = "torch DCP async_save, process"
    shared = True

    def __init__(self, state: State, folder: Path) -> None:
        """It asks for a process group, if only of one process."""
        import torch.distributed as distributed

        super().__init__(state, folder)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", rank=0, world_size=1)

    def _options(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        return {"async_stager": self._stager, "async_checkpointer_type": AsyncCheckpointerType.PROCESS}


class OrbaxNumpy(Peer):
    name = "Orbax async, NumPy"
    needs = "orbax.checkpoint"

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        orbax = self._orbax = import_module("orbax.checkpoint")
        self._checkpointer: Any = orbax.AsyncCheckpointer(orbax.PyTreeCheckpointHandler())
        self._waiting: threading.Thread | None = None

    def _tree(self) -> Mapping[str, Any]:
        return {name: tensor.detach().numpy() for name, tensor in self._state.named().items()}

    def begin(self) -> None:
        self._checkpointer.save(self._path.absolute(), args=self._orbax.args.PyTreeSave(self._tree()))
        self._waiting = threading.Thread(target=self._checkpointer.wait_until_finished)
        self._waiting.start()

    def is_done(self) -> bool:
        return self._waiting is None or not self._waiting.is_alive()

    def finish(self) -> None:
        if self._waiting is not None:
            self._waiting.join()

    def load(self) -> Mapping[str, Any]:
        wanted = self._orbax.RestoreArgs()
        wanted.restore_type = numpy.ndarray
        arguments = dict.fromkeys(self._state.named(), wanted)
        found: Mapping[str, Any] = self._checkpointer.restore(
            self._path.absolute(), args=self._orbax.args.PyTreeRestore(restore_args=arguments)
        )
        return found

    def close(self) -> None:
        self._checkpointer.close()


class OrbaxJax(OrbaxNumpy):
    name = "Orbax async, JAX"

    def prepare(self) -> None:
        """JAX's arrays cannot be changed: each step makes new ones, which is not timed."""
        super().prepare()
        make = import_module("jax.numpy").array
        self._step = self._state.steps
        self._arrays = {name: make(array) for name, array in super()._tree().items()}

    @property
    def step(self) -> int:
        return self._step

    def _tree(self) -> Mapping[str, Any]:
        return self._arrays


class Lightning(Peer):
    name = "Lightning AsyncCheckpointIO"
    needs = "pytorch_lightning"
    synced = "never"

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        plugins = import_module("pytorch_lightning.plugins.io")
        self._io: Any = plugins.AsyncCheckpointIO(plugins.TorchCheckpointIO())
        self._waiting: threading.Thread | None = None

    def begin(self) -> None:
        self._io.save_checkpoint(self._state.named(), str(self._path))
        self._waiting = threading.Thread(target=self._io.teardown)
        self._waiting.start()

    def is_done(self) -> bool:
        return self._waiting is None or not self._waiting.is_alive()

    def finish(self) -> None:
        if self._waiting is not None:
            self._waiting.join()

    def load(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = torch.load(self._path, weights_only=True)
        return found


class TensorflowSaver(Peer):
    """A ``Saver`` in a thread, as TensorFlow's own Supervisor has it. Its variables are stepped beside ours."""

    name = "TF Saver in a thread"
    needs = "tensorflow"
    synced = "never"

    def __init__(self, state: State, folder: Path) -> None:
        os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
        import tensorflow

        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        super().__init__(state, folder)
        self._v1: Any = tensorflow.compat.v1
        self._waiting: threading.Thread | None = None
        self._graph = self._v1.Graph()
        with self._graph.as_default():
            self._variables = {
                name: self._v1.get_variable(
                    name.replace(".", "/"), [tensor.numel()], self._v1.float32, use_resource=True,
                    initializer=self._v1.zeros_initializer(),
                )
                for name, tensor in state.named().items()
            }  # fmt: skip
            self._fed = self._v1.placeholder(self._v1.float32, [None])
            self._assign = {
                name: self._v1.raw_ops.AssignVariableOp(resource=variable.handle, value=self._fed)
                for name, variable in self._variables.items()
            }
            self._touch = self._v1.group(*map(self._add_to_ends, self._variables.values()))
            self._saver = self._v1.train.Saver(list(self._variables.values()), write_version=2)
            self._session = self._v1.Session()

    def _add_to_ends(self, variable: Any) -> Any:
        ends = [0, variable.shape[0] - 1] if variable.shape[0] > 1 else [0]
        return self._v1.raw_ops.ResourceScatterAdd(resource=variable.handle, indices=ends, updates=[UNIT] * len(ends))

    def prepare(self) -> None:
        super().prepare()
        for name, tensor in self._state.named().items():
            self._session.run(self._assign[name], {self._fed: tensor.detach().reshape(-1).numpy()})

    def begin(self) -> None:
        self._path.mkdir()
        self._waiting = threading.Thread(target=self._save)
        self._waiting.start()

    def _save(self) -> None:
        with self._graph.as_default():
            self._saver.save(self._session, str(self._path / "model"), write_meta_graph=False)

    def is_done(self) -> bool:
        return self._waiting is None or not self._waiting.is_alive()

    def finish(self) -> None:
        if self._waiting is not None:
            self._waiting.join()

    def load(self) -> Mapping[str, Any]:
        reader = self._v1.train.load_checkpoint(str(self._path / "model"))
        return {name: reader.get_tensor(name.replace(".", "/")) for name in self._state.named()}

    def each_step(self) -> None:
        self._session.run(self._touch)

    def close(self) -> None:
        self._session.close()


PEERS: tuple[type[Peer], ...] = (
    TorchSave, Safetensors, DcpSave, DcpAsync, DcpReused, DcpProcess, OrbaxNumpy, OrbaxJax, Lightning, TensorflowSaver,
)  # fmt: skip


def available(state: State, folder: Path, say: Callable[[str], object]) -> list[Peer]:
    """Those that are installed and work here; of the others it is said that they are left out."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    logging.getLogger("absl").setLevel(logging.ERROR)
    found: list[Peer] = []
    for kind in PEERS:
        try:
            if kind.needs is not None and importlib.util.find_spec(kind.needs) is None:
                raise ModuleNotFoundError(f"No module named {kind.needs!r}")
            peer = kind(state, folder)
            peer.prepare()
            peer.begin()
            peer.finish()
            peer.load()
            peer.clear()
        except ModuleNotFoundError as error:
            say(f"   left out: {kind.name}: not installed ({error}); the extra 'bench' has it")
        except Exception as error:
            say(f"   left out: {kind.name}: it does not work here ({type(error).__name__}: {str(error)[:100]})")
        else:
            found.append(peer)
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

"""Patches that make megatron-core run without CUDA; no other file knows about them.

megatron-core names the CUDA device literally (``device="cuda"``, ``torch.cuda.current_device()``), so as shipped it
runs on nothing else, although gloo offers every collective it needs. ``install()`` gives the modules of
``megatron.core`` a stand-in for the name ``torch`` that sends those literals to the CPU, and replaces the few functions
that the stand-in cannot reach. All other code keeps the real ``torch``. With CUDA nothing here is called.

Each patch names the file and line of megatron-core 0.16.1 that needs it, relative to ``megatron/core``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megakd.errors import UsageError

CHECKED_VERSIONS = ("0.16.1",)

_FACTORIES = (
    "zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn", "zeros_like", "ones_like", "empty_like",
    "full_like",
)  # fmt: skip
_CUDA_TYPE_NAMES = {
    f"torch.{name}": f"torch.cuda.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor")
}


def needed() -> bool:
    """Return True if this process has no CUDA device, so that megatron-core needs `install`."""
    return not torch.cuda.is_available()


def check_version(version: str) -> None:
    """Refuse a megatron-core whose source the patches were not checked against.

    Raises:
        UsageError: the version is not in ``CHECKED_VERSIONS``.
    """
    if version not in CHECKED_VERSIONS:
        raise UsageError(
            f"megatron-core {version} has not been checked on CPU; checked: {', '.join(CHECKED_VERSIONS)}. "
            f"Install it with: pip install megatron-core=={CHECKED_VERSIONS[-1]}"
        )


def hide_absent_cuda_packages() -> None:
    """Make ``import transformer_engine`` and ``import apex`` fail cleanly; call before the first megatron import.

    Without CUDA libraries Transformer Engine raises RuntimeError, which megatron-core does not catch, and the unrelated
    project that PyPI calls ``apex`` would be taken for NVIDIA's (transformer/transformer_block.py:45).
    """
    for name in ("transformer_engine", "apex"):
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]


def refuse_foreign_apex() -> None:
    """Refuse the project that PyPI calls ``apex``; NVIDIA's apex, which megatron-core looks for, is built from source.

    Raises:
        UsageError: an ``apex`` without NVIDIA's optimizers is installed.
    """
    spec = importlib.util.find_spec("apex")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if spec is not None and not any((Path(folder) / "optimizers").is_dir() for folder in folders):
        raise UsageError(
            f"the installed package 'apex' ({', '.join(folders) or spec.origin}) is not NVIDIA's: megatron-core would "
            "take it for that. Remove it with: pip uninstall apex"
        )


def install() -> None:
    """Make ``megatron.core`` run on CPU in this process. A second call does nothing.

    Raises:
        UsageError: this version of megatron-core has not been checked, or a patched name is no longer there.
    """
    if any(isinstance(finder, _FacadeFinder) for finder in sys.meta_path):
        return
    hide_absent_cuda_packages()
    with warnings.catch_warnings():
        # eight modules warn that Transformer Engine and apex are missing, which is intended
        warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
        check_version(importlib.import_module("megatron.core.package_info").__version__)
        for name in ("optimizer", "transformer.moe.token_dispatcher", "tensor_parallel.random", "models.gpt"):
            importlib.import_module(f"megatron.core.{name}")
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    facade = _build_facade()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            _bind(module, facade)
    sys.meta_path.insert(0, _FacadeFinder(facade))
    _patch_rng()
    _patch_type_names()
    _patch_moves()
    _patch_moe()


# --- the stand-in for the name `torch` inside megatron.core ----------------------------------------------------------


class _Facade(types.ModuleType):
    """A module that has a few names of its own and passes every other name to the real module."""

    def __init__(self, real: types.ModuleType, **overrides: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(overrides, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _FacadeFinder(importlib.abc.MetaPathFinder):
    """Import hook that binds the facade in modules of megatron.core that are imported later."""

    def __init__(self, facade: types.ModuleType) -> None:
        self.facade = facade

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            _bind(module, self.facade)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _bind(module: types.ModuleType | None, facade: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = facade  # type: ignore[union-attr]


class _Stream:
    """Stand-in for CUDA streams and events (transformer/moe/token_dispatcher.py:445, distrib_optimizer.py): no-ops."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record_event(self, *_args: Any) -> _Stream:
        return self

    def _nothing(self, *_args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = wait = record = _nothing


def _build_facade() -> types.ModuleType:
    cpu = torch.device("cpu")
    stream = _Stream()

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    cuda = _Facade(
        torch.cuda,
        current_device=lambda: cpu,  # pipeline_parallel/p2p_communication.py:313, optimizer/optimizer.py:907, ...
        device_count=lambda: 1,
        set_device=nothing,
        synchronize=nothing,  # dist_checkpointing/strategies/filesystem_async.py:230, timers.py:152
        empty_cache=nothing,
        Stream=_Stream,
        Event=_Stream,
        stream=lambda _stream: contextlib.nullcontext(),
        current_stream=lambda *_args: stream,
        default_stream=lambda *_args: stream,
        manual_seed=torch.manual_seed,  # tensor_parallel/random.py:422
        get_rng_state=lambda *_args, **_kwargs: torch.get_rng_state(),  # tensor_parallel/random.py:235
        set_rng_state=lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        random=types.SimpleNamespace(get_rng_state=lambda *_args, **_kwargs: torch.get_rng_state()),
        nvtx=types.SimpleNamespace(
            range_push=nothing, range_pop=nothing, range=lambda *_args: contextlib.nullcontext()
        ),
    )
    # device="cuda" in pipeline_parallel/schedules.py:596, 983, 2138, transformer/moe/router.py:90, clip_grads.py:103
    factories = {name: _to_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _Facade(torch, cuda=cuda, **factories)


def _to_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


# --- named functions --------------------------------------------------------------------------------------------------


def _replace(module_name: str, attribute: str, make: Callable[[Any], Any]) -> None:
    """Set ``module.attribute`` to ``make(original)``, insisting that the original exists. Dots reach into classes."""
    owner: Any = importlib.import_module(f"megatron.core.{module_name}")
    *path, last = attribute.split(".")
    for name in path:
        owner = getattr(owner, name)
    if not hasattr(owner, last):
        raise UsageError(f"megatron.core.{module_name}.{attribute} is gone; megakd/cpu.py must be checked again")
    setattr(owner, last, make(getattr(owner, last)))


def _patch_rng() -> None:
    """Replace the CUDA generators that tensor_parallel/random.py:55, 243 takes by names from ``torch.cuda``."""

    def make_tracker(tracker: type) -> type:
        class CpuRngStatesTracker(tracker):  # type: ignore[misc]
            """Tracker that forks the CPU generator; megatron's own warns whenever it moves (random.py:264)."""

            states_: dict[str, torch.Tensor]
            _current_state_name: str

            @contextlib.contextmanager
            def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
                if name not in self.states_:
                    raise KeyError(f"rng state {name} is not added; known: {sorted(self.states_)}")
                outer_name, outer_state = self._current_state_name, torch.get_rng_state()
                torch.set_rng_state(self.states_[name])
                self._current_state_name = name
                try:
                    yield
                finally:
                    self.states_[name] = torch.get_rng_state()
                    torch.set_rng_state(outer_state)
                    self._current_state_name = outer_name

        return CpuRngStatesTracker

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    _replace("tensor_parallel.random", "CudaRNGStatesTracker", make_tracker)
    _replace("tensor_parallel.random", "_get_cuda_rng_state", lambda _original: get_state)
    _replace("tensor_parallel.random", "_set_cuda_rng_state", lambda _original: set_state)


def _patch_type_names() -> None:
    """Give CPU tensors CUDA type names where megatron compares ``type()`` with those.

    optimizer/optimizer.py:481, optimizer/distrib_optimizer.py:361, optimizer/clip_grads.py:167.
    """

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _cuda_type_names():
                return function(*args, **kwargs)

        return call

    _replace("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__", named)
    _replace("optimizer.distrib_optimizer", "DistributedOptimizer.__init__", named)
    _replace("optimizer.clip_grads", "clip_grad_by_total_norm_fp32", named)
    _replace("optimizer.optimizer", "clip_grad_by_total_norm_fp32", named)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Make ``tensor.type()`` of a CPU tensor return the CUDA name inside the block."""
    original = torch.Tensor.type

    def tensor_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(tensor, *args, **kwargs)
        return _CUDA_TYPE_NAMES.get(result, result) if isinstance(result, str) else result

    torch.Tensor.type = tensor_type  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _patch_moves() -> None:
    """Make ``tensor.cuda()`` a no-op in language_module.py:244, rope_utils.py:64 and distrib_optimizer.py:1089."""

    def without_move(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            original = torch.Tensor.cuda
            torch.Tensor.cuda = lambda tensor, *_args, **_kwargs: tensor  # type: ignore[method-assign]
            try:
                return function(*args, **kwargs)
            finally:
                torch.Tensor.cuda = original  # type: ignore[method-assign]

        return call

    language_module = "models.common.language_module.language_module"
    _replace(language_module, "LanguageModule.setup_embeddings_and_output_layer", without_move)
    _replace("models.common.embeddings.rope_utils", "get_pos_emb_on_this_cp_rank", without_move)
    _replace("models.common.embeddings.rotary_pos_embedding", "get_pos_emb_on_this_cp_rank", without_move)
    _replace("optimizer.distrib_optimizer", "DistributedOptimizer.get_parameter_state_dp_zero", without_move)


def _patch_moe() -> None:
    """Patch the experts: a name of Transformer Engine (moe_utils.py:1192), CPU tensors (token_dispatcher.py:876)."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace("transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", lambda _original: move)

"""How the networks are spread over processes; the modules themselves know nothing of it.

Every strategy is torch's `fully_shard` on some mesh of processes: parameters are DTensors whose shards lie along the
mesh, each unit is gathered when it is called, and its gradient is averaged over all processes on the way back.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from dinov2_eq.distributed import (
    gather_objects,
    get_local_world_size,
    get_world_size,
    is_distributed,
    is_main_process,
)

logger = logging.getLogger(__name__)


class Strategy(NamedTuple):
    """
    Args:
        mesh_shape: (replicas, shards) out of (number of processes, processes on each node).
        reshard: free what was gathered after each unit's forward, and gather it again for its backward.
    """

    mesh_shape: Callable[[int, int], tuple[int, int]]
    reshard: bool


STRATEGIES = {
    "ddp": Strategy(lambda world, local: (world, 1), reshard=False),
    "full": Strategy(lambda world, local: (1, world), reshard=True),
    "grad_op": Strategy(lambda world, local: (1, world), reshard=False),
    "hybrid": Strategy(lambda world, local: (world // local, local), reshard=True),
}


class Policy(NamedTuple):
    """
    Args:
        strategy: a name of `STRATEGIES`, or "none" for a single process.
        activation_checkpointing: keep only the inputs of each block and compute the rest again in the backward pass.
        compile: compile each block.
        half_precision: gather parameters in bfloat16; gradients are summed in float32 all the same.
    """

    strategy: str = "none"
    activation_checkpointing: bool = False
    compile: bool = False
    half_precision: bool = False


def parallelize(modules: Iterable[nn.Module], policy: Policy, device: torch.device) -> None:
    """Spreads modules, still on the meta device, over the processes, each with its blocks as units of their own.

    Args:
        modules: whatever holds parameters; a module with a method `stages` names its blocks. A container that is never
            called itself, such as a `ModuleDict`, is taken apart into what is called. Frozen modules are resharded
            after each forward, as no backward would do it.

    Raises:
        ValueError: strategy none with several processes, or hybrid with nodes of different sizes.
    """
    # Backbones return views of their tokens, which torch warns of for the sake of in-place writes; there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = _make_mesh(policy.strategy, device) if is_distributed() else None
    obstacle = why_compile_fails(device) if policy.compile else ""
    if obstacle:
        logger.warning("fsdp.compile=true cannot be used here, blocks run eagerly: %s", obstacle)
    for module in (called for given in modules for called in _called(given)):
        blocks = list(module.stages()) if hasattr(module, "stages") else []
        for block in blocks:
            if policy.activation_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if policy.compile and not obstacle:
                block.forward = torch.compile(block.forward)
        if mesh is not None:
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            for unit in (*blocks, module):
                fully_shard(
                    unit,
                    mesh=mesh,
                    reshard_after_forward=frozen or STRATEGIES[policy.strategy].reshard,
                    mp_policy=MixedPrecisionPolicy(
                        param_dtype=torch.bfloat16 if policy.half_precision else None,
                        reduce_dtype=torch.float32,
                        cast_forward_inputs=False,  # autocast decides what runs in which precision
                    ),
                )


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or what is called in its place where it has no forward; what has no parameters is left out."""
    if type(module).forward is nn.Module.forward:
        for child in module.children():
            yield from _called(child)
    elif any(True for _ in module.parameters()):
        yield module


def _make_mesh(name: str, device: torch.device) -> DeviceMesh:
    world, local = get_world_size(), get_local_world_size()
    if name not in STRATEGIES:
        raise ValueError(
            f"fsdp.strategy={name} is for a single process, and {world} were started; choose {', '.join(STRATEGIES)}"
        )
    if name == "hybrid" and len(sizes := set(gather_objects(local))) > 1:
        raise ValueError(
            f"fsdp.strategy=hybrid needs as many processes on each node, but nodes have {sorted(sizes)}; start the "
            "same number on each, or choose full or grad_op"
        )
    replicas, shards = STRATEGIES[name].mesh_shape(world, local)
    if replicas == 1:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def load_full(module: nn.Module, make_state: Callable[[], dict[str, Tensor]]) -> None:
    """Fills a module, sharded or not, with a whole state dict that the main process makes and the others receive."""
    if not module.state_dict():
        return
    if not is_distributed():
        module.load_state_dict(make_state())
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = dict(make_state()) if is_main_process() else {}  # a copy, as torch puts its shards in
    set_model_state_dict(module, state, options=options)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a module, sharded or not, on the CPU of the main process; {} on the others."""
    if not is_distributed():
        return {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradients together to the norm `max_norm` over all shards; returns the norm before that, a scalar."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norm = nn.utils.get_total_norm(gradients, foreach=True)  # not by itself where parameters are sharded
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


@cache
def why_compile_fails(device: torch.device) -> str:
    """The first line of what goes wrong when torch.compile is tried on something tiny, or "" where it works."""

    def probe(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x) * 2

    try:
        torch.compile(probe)(torch.ones(8, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # a missing compiler, an unsupported GPU, a broken cache: all mean "not here"
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""

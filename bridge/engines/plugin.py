"""What vLLM runs in each of its processes (entry point group `vllm.general_plugins`)."""

import ctypes
import multiprocessing
import os
import signal

BACKEND = "jaxrl_bridge"
_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Makes the weight-transfer backend known to vLLM, and ties this process to its parent.

    Runs in the front end, in the engine core and in every worker, and may run twice.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    _die_with_parent()
    # The factory has no way to ask, and refuses a name that it has.
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "bridge.engines.weight_transfer", "BridgeWeightTransferEngine"
        )


def _die_with_parent() -> None:
    """Has the kernel kill this process when the process that spawned it is gone.

    An actor that is killed outright cannot stop its engine core, which would live on with its
    memory and its accelerator. The front end has no multiprocessing parent and is left alone.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not os.path.exists("/proc/self"):  # a child, and on Linux
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not parent.is_alive():  # it died before the call above could hear of it
        os._exit(1)

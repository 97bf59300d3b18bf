"""`executor: ray`: tasks of a Ray cluster, the one that RAY_ADDRESS names, or one on this machine (pip install
'alma[ray]').

An executor has one method, `submit(function, *arguments)`, which returns a concurrent.futures.Future. Functions write
complete files to a file system that all machines share, so a task that runs twice does no harm.
"""

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any

from pipeline.core.errors import UserError
from pipeline.data.cleaning.process_setup import ROOT, run_task


class RayExecutor:
    def __init__(self, workers: int | None):
        try:
            import ray
        except ImportError:
            raise UserError(
                "executor: ray needs Ray, which is not installed; run pip install 'alma[ray]', or set executor: local"
            ) from None
        self.ray = ray
        # Ray does not pass on import paths: workers must import this program, even if it is not installed.
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        ray.init(
            num_cpus=workers if "RAY_ADDRESS" not in os.environ else None,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        self.workers = workers or int(ray.cluster_resources().get("CPU", 1))
        self.task = ray.remote(num_cpus=1)(run_task)

    def submit(self, function: Callable[..., Any], *arguments) -> concurrent.futures.Future:
        return self.task.remote(os.getcwd(), function, arguments).future()

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self.ray.shutdown()

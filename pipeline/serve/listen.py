"""`alma serve`: loads the models, opens the port, and serves until it is stopped."""

import os
import socket

import uvicorn

from pipeline.core.errors import UserError
from pipeline.core.terminal import show
from pipeline.serve.generator import Generator
from pipeline.serve.server import App, Limits
from pipeline.serve.target import Target

GRACE = 5  # seconds for requests that are being answered when the server is stopped


def run(targets: list[Target], limits: Limits, key: str | None, host: str, port: int, device: str, dtype: str) -> None:
    """Serve until SIGINT or SIGTERM. The port is taken before the models are loaded. Raises UserError."""
    with _listening(host, port) as listener:
        models = {}
        for target in targets:
            models[target.title] = generator = Generator(target.folder, device, dtype)
            what = "" if generator.chat else ", no chat template: /v1/completions only"
            size = f"{generator.num_parameters / 1e6:.1f}M parameters, {generator.dtype} on {generator.device}"
            show(f"model      {target.title}: {size}{what}")
        config = uvicorn.Config(
            App(models, limits, key).asgi(),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE,
            server_header=False,
        )
        address = f"[{host}]" if ":" in host else host
        server = f"http://{address}:{listener.getsockname()[1]}"
        show(f"chat page  {server}/")
        show(f"serving    {server}/v1{' with a key' if key else ''}; Ctrl-C ends")
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise UserError(f"cannot serve on {host} port {port} ({reason}); give another --port or --host") from None
    return listener

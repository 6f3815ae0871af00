"""`python -m jaxattn.serve CKPT`: an OpenAI-style server for a converted checkpoint or a trained run (extra `serve`).

    POST /v1/completions, /v1/chat/completions     GET /v1/models, /v1/models/NAME, /health

Requests decode together in fixed slots; who finds none free waits in a queue, and past its limit gets 429.
"""

from __future__ import annotations

import argparse
import logging
import socket
from pathlib import Path

from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, UserError
from jaxattn.policies.command import add_flags, asked
from jaxattn.serving.memory import bound_heaps, give_back, settle
from jaxattn.signals import loading


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxattn.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--name", help="the model's name in requests (default: the folder's)")
    parser.add_argument("--slots", type=int, default=8, help="sequences decoded together (default 8)")
    parser.add_argument("--context", type=int, help="tokens of prompt and answer (default: the model's, at most 2048)")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait (default 256)")
    parser.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request's body (default 1 MiB)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: the model's)")
    parser.add_argument("--attn", help="other options of the model's attention, such as softmax(window=64)")
    add_flags(parser)
    args = parser.parse_args()
    bound_heaps()
    with loading():
        try:
            import uvicorn

            from jaxattn.serving.app import make_app
            from jaxattn.serving.connection import protocol
        except ImportError as error:
            raise UserError(
                f"the server needs {error.name}: install the extra with pip install 'jaxattn[serve]'."
            ) from error
        from jaxattn.compile_cache import prepare_jax
        from jaxattn.serving.engine import Engine
        from jaxattn.text import load

    if args.max_body < 1:
        raise ConfigError(f"--max-body is {args.max_body} but must be at least 1.")
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port is {args.port} but must be from 0 to 65535.")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    listener = _listen(args.host, args.port)  # before the model is read, which takes longer
    prepare_jax()
    loaded = load(args.checkpoint, dtype=args.dtype, attn=args.attn, asked=asked(args)).prepared(consume=True)
    give_back()
    context = min(loaded.context, 2048) if args.context is None else args.context
    engine = Engine(loaded.model, loaded.params, slots=args.slots, context=context, queue=args.queue)
    engine.warm_up()
    settle()
    app = make_app(loaded, engine, args.name or args.checkpoint.resolve().name, args.max_body)
    print(f"http://{args.host}:{listener.getsockname()[1]}", flush=True)
    # Ctrl-C does not wait for answers that take minutes.
    config = uvicorn.Config(
        app, http=protocol(), ws="none", log_level="info", timeout_keep_alive=5, timeout_graceful_shutdown=3
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises `UserError` if the address cannot be had."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port.") from error


if __name__ == "__main__":
    run_cli(main)

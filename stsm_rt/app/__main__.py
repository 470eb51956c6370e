"""The command that serves the page."""

from __future__ import annotations

import argparse
import os
import signal
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stsm_rt.app.engines import find_engines
from stsm_rt.app.jobs import Limits
from stsm_rt.engine.base import shipped_folder
from stsm_rt.errors import UserError, report
from stsm_rt.video.sample import SampleClip, sample_clip

if TYPE_CHECKING:
    from fastapi import Request

_CLEAR_OUT = 60.0  # seconds between two looks at what nobody needs any more


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        argv: The arguments; None means those of the process.

    Returns:
        The exit code: 0, or 2 after an error in one sentence.
    """
    try:
        options = _options(argv)
        with tempfile.TemporaryDirectory(prefix="stsm-rt-") as folder:
            _serve(options, Path(folder))
    except UserError as error:
        return report(error)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="stsm-rt app",
        description="Serve a page where videos are uploaded, cameras pointed and actions recognized.",
        epilog="A browser opens the camera of a page from another machine only over HTTPS.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: only this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: 7860)")
    parser.add_argument("--auth", metavar="FILE", type=Path, help="file of lines user:password; who may see the page")
    parser.add_argument("--certificate", metavar="FILE", type=Path, help="TLS certificate (PEM), for HTTPS")
    parser.add_argument("--key", metavar="FILE", type=Path, help="private key of the certificate (PEM)")
    parser.add_argument("--engines", metavar="DIR", type=Path, help="folder of the engines to choose from")
    parser.add_argument("--visitors", metavar="N", type=int, default=4, help="cameras at the same time (default: 4)")
    parser.add_argument(
        "--idle", metavar="S", type=float, default=60.0, help="seconds without a frame that end a visit (default: 60)"
    )
    parser.add_argument(
        "--max-megabytes",
        metavar="MB",
        type=int,
        default=limits.megabytes,
        help="largest upload (default: %(default)s)",
    )
    parser.add_argument(
        "--max-minutes",
        metavar="M",
        type=float,
        default=limits.seconds / 60,
        help="longest upload (default: %(default)g)",
    )
    options = parser.parse_args(argv)
    for name, least in (("visitors", 1), ("idle", 1), ("max_megabytes", 1), ("port", 0)):
        if not getattr(options, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(options, name)}")
    if options.port > 65535:
        raise UserError(f"--port must be at most 65535, not {options.port}")
    if not options.max_minutes > 0:
        raise UserError(f"--max-minutes must be positive, not {options.max_minutes:g}")
    if (options.certificate is None) != (options.key is None):
        raise UserError("--certificate and --key belong together; give both or neither")
    if options.certificate is not None:
        try:
            ssl.create_default_context().load_cert_chain(options.certificate, options.key, password="")
        except OSError as error:
            raise UserError(
                f"{options.certificate} and {options.key} are no certificate with its key, in PEM and without a "
                f"password ({error.strerror or error}); give other files"
            ) from error
    return options


def _serve(options: argparse.Namespace, folder: Path) -> None:
    # What visitors upload lies with the rest, so that nothing is left when this ends; and nothing is told to anybody.
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from stsm_rt.app.page import build_page, fetch_nothing, look
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stsm_rt"):
            raise
        raise UserError(
            f"the page needs {error.name}, which is not installed; run: pip install 'stsm-rt[ui]'"
        ) from error
    from stsm_rt.app.live import add_live
    from stsm_rt.app.uploads import Uploads
    from stsm_rt.app.visitors import Visitors

    engines = options.engines or shipped_folder("engines")
    if engines is None:
        raise UserError("this installation holds no engines; give a folder of engines with --engines")
    choices = find_engines(engines)
    uploads = Uploads(folder, Limits(megabytes=options.max_megabytes, seconds=60 * options.max_minutes))
    visitors = Visitors(choices, most=options.visitors, idle=options.idle)
    fetch_nothing()
    page = build_page(choices, visitors, uploads, _sample())
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        app, url, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            auth=None if options.auth is None else _users(options.auth),
            ssl_certfile=options.certificate and str(options.certificate),
            ssl_keyfile=options.key and str(options.key),
            ssl_verify=False,
            max_file_size=options.max_megabytes * 1024**2,
            share=False,
            allowed_paths=[],
            footer_links=["api"],
            run_history=False,
            quiet=True,
            prevent_thread_lock=True,
            **look(),
        )
        add_live(app, visitors, None if options.auth is None else _login_check(app))
        print(f"the page is at {url} (Ctrl+C ends it)", flush=True)
        while not ended.wait(_CLEAR_OUT):
            uploads.clear_out()
    except OSError as error:
        raise UserError(
            f"port {options.port} of {options.host} cannot be used, it is taken or not allowed; give another --port"
        ) from error
    finally:
        uploads.close()
        page.close(verbose=False)


def _login_check(app: Any) -> Callable[[Request], bool]:
    """Whether somebody has logged in, as Gradio itself tells it."""

    def has_logged_in(request: Request) -> bool:
        cookies = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
        return any(app.tokens.get(request.cookies.get(cookie)) is not None for cookie in cookies)

    return has_logged_in


def _users(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"the file of users {path} cannot be read ({error.strerror})") from error
    users = []
    for number, line in enumerate(lines, 1):
        user, colon, password = line.partition(":")
        if line.strip():
            if not (user and colon and password):
                raise UserError(f"line {number} of {path} should be user:password, but has no colon between two words")
            users.append((user, password))
    if not users:
        raise UserError(f"the file of users {path} is empty; write a line user:password")
    return users


def _sample() -> SampleClip | None:
    try:
        return sample_clip()
    except UserError:
        return None


if __name__ == "__main__":
    sys.exit(main())

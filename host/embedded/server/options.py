"""The command line of the server: ComfyUI's flags with ComfyUI's meaning.

Flags of ComfyUI that choose an attention kernel, a memory strategy and the like have nothing to switch here; they are
accepted so that launchers written for ComfyUI start this host too, and one line says which of them have no effect.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..context import HostSettings

__all__ = ["Limits", "ServerOptions", "parse_arguments"]

MEGABYTE = 1024 * 1024
ANY_ADDRESS = "0.0.0.0,::"
DEFAULT_FRONT_END = "comfyanonymous/ComfyUI@latest"

# Known to ComfyUI, without a counterpart on this host. The number is how many values the flag takes.
WITHOUT_EFFECT = {
    "0": (
        "disable-auto-launch", "cuda-malloc", "disable-cuda-malloc", "fp64-unet", "fp8_e4m3fn-unet", "fp8_e5m2-unet",
        "fp8_e8m0fnu-unet", "fp16-vae", "fp32-vae", "bf16-vae", "cpu-vae", "fp8_e4m3fn-text-enc", "fp8_e5m2-text-enc",
        "fp16-text-enc", "fp32-text-enc", "bf16-text-enc", "force-channels-last", "disable-ipex-optimize",
        "supports-fp8-compute", "cache-classic", "use-split-cross-attention", "use-quad-cross-attention",
        "use-pytorch-cross-attention", "use-sage-attention", "use-flash-attention", "disable-xformers",
        "force-upcast-attention", "dont-upcast-attention", "gpu-only", "highvram", "normalvram", "lowvram", "novram",
        "async-offload", "force-non-blocking", "disable-smart-memory", "deterministic", "mmap-torch-files", "disable-mmap",
        "windows-standalone-build", "disable-api-nodes",
    ),
    "1": ("oneapi-device-selector", "reserve-vram", "default-hashing-function", "comfy-api-base", "database-url"),
    "?": ("directml",),
    "*": ("fast",),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the server refuses, so that no request can fill memory or freeze it."""

    upload_bytes: int = 100 * MEGABYTE
    prompt_bytes: int = 5 * MEGABYTE
    prompt_nodes: int = 2000
    prompt_depth: int = 64
    queue_length: int = 1000
    queue_bytes: int = 512 * MEGABYTE
    history_length: int = 10000
    history_bytes: int = 512 * MEGABYTE
    socket_backlog_bytes: int = 4 * MEGABYTE
    socket_message_bytes: int = 1 * MEGABYTE


@dataclass(frozen=True)
class ServerOptions:
    """What the command line decided. Folders that were not given are None and take the host's default."""

    listen: tuple[str, ...] = ("127.0.0.1",)
    port: int = 8188
    tls_keyfile: Path | None = None
    tls_certfile: Path | None = None
    cors_origin: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    base_directory: Path | None = None
    output_directory: Path | None = None
    input_directory: Path | None = None
    temp_directory: Path | None = None
    user_directory: Path | None = None
    extra_model_paths: tuple[Path, ...] = ()
    front_end_root: Path | None = None
    cache_lru: int = 0
    cache_none: bool = False
    preview_size: int = 512
    multi_user: bool = False
    custom_nodes: bool = True
    custom_nodes_kept: tuple[str, ...] = ()
    compress: bool = False
    auto_launch: bool = False
    quiet: bool = False
    verbose: str = "INFO"
    log_stdout: bool = False
    quick_test: bool = False
    cuda_visible: str | None = None
    limits: Limits = field(default_factory=Limits)
    host: HostSettings = field(default_factory=HostSettings)

    @property
    def only_loopback(self) -> bool:
        """Whether every address that is listened on is reachable from this machine alone."""
        return all(address == "localhost" or _is_loopback(address) for address in self.listen)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is not a folder")
    return path.resolve()


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port; allowed: 0 (any free one) to 65535")
    return port


def _megabytes(text: str) -> int:
    size = float(text)
    if not (math.isfinite(size) and size > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a size in MB; allowed: a number above 0")
    return round(size * MEGABYTE)


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--listen",
        nargs="?",
        default="127.0.0.1",
        const=ANY_ADDRESS,
        metavar="IP",
        help="addresses, separated by commas; without a value: every interface (default: 127.0.0.1)",
    )
    group.add_argument("--port", type=_port, default=8188, help="default: 8188; 0 takes a free one and prints it")
    group.add_argument("--tls-keyfile", type=Path, metavar="FILE")
    group.add_argument("--tls-certfile", type=Path, metavar="FILE", help="with --tls-keyfile: serve https")
    group.add_argument(
        "--enable-cors-header",
        nargs="?",
        const="*",
        default=None,
        metavar="ORIGIN",
        help="allow pages of ORIGIN (default: all) to use this server; replaces the origin guard",
    )
    group.add_argument(
        "--trusted-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which a reverse proxy reaches this loopback server; may be repeated",
    )
    group.add_argument("--max-upload-size", type=_megabytes, default=100 * MEGABYTE, metavar="MB", help="default: 100")
    group.add_argument("--enable-compress-response-body", action="store_true", help="gzip JSON and text answers")


def _add_folders(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("folders")
    group.add_argument("--base-directory", type=Path, metavar="DIR", help="holds models, custom_nodes, input, output, temp and user")
    group.add_argument("--output-directory", type=Path, metavar="DIR")
    group.add_argument("--input-directory", type=Path, metavar="DIR")
    group.add_argument("--temp-directory", type=Path, metavar="DIR", help="a folder 'temp' is made in it and emptied at start and stop")
    group.add_argument("--user-directory", type=_folder, metavar="DIR", help="settings and saved workflows")
    group.add_argument(
        "--extra-model-paths-config",
        type=Path,
        nargs="+",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML files that name further model and custom_nodes folders",
    )
    group.add_argument("--front-end-root", type=_folder, metavar="DIR", help="the static folder of another interface version")
    group.add_argument("--front-end-version", default=DEFAULT_FRONT_END, help=argparse.SUPPRESS)


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    device = group.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="compute on the CPU")
    device.add_argument("--cuda-device", type=int, metavar="N", help="use this GPU and see no other")
    device.add_argument("--default-device", type=int, metavar="N", help="use this GPU, leave the others visible")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--force-fp32", "--fp32-unet", action="store_true", dest="fp32")
    precision.add_argument("--force-fp16", "--fp16-unet", action="store_true", dest="fp16")
    precision.add_argument("--bf16-unet", action="store_true", dest="bf16")
    group.add_argument("--cache-lru", type=int, default=0, metavar="N", help="keep the results of the N nodes used last")
    group.add_argument("--cache-none", action="store_true", help="keep no results: every node of every prompt runs")
    group.add_argument("--preview-method", choices=("none", "auto", "latent2rgb", "taesd"), default="auto", help="default: auto")
    group.add_argument("--preview-size", type=int, default=512, metavar="PIXELS")
    group.add_argument("--disable-metadata", action="store_true", help="write no prompt and workflow into pictures")
    group.add_argument("--disable-all-custom-nodes", action="store_true")
    group.add_argument("--whitelist-custom-nodes", nargs="+", default=[], metavar="NAME", help="load these nevertheless")
    group.add_argument("--multi-user", action="store_true", help="settings and workflows per user (a convenience, not a protection)")


def _add_process(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("process")
    group.add_argument("--auto-launch", action="store_true", help="open the interface in the default browser")
    group.add_argument("--quick-test-for-ci", action="store_true", help="load everything, then exit with status 0")
    group.add_argument("--dont-print-server", action="store_true", help="print no start-up lines")
    group.add_argument("--verbose", nargs="?", const="DEBUG", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    group.add_argument("--log-stdout", action="store_true", help="log to stdout instead of stderr (errors stay on stderr)")
    for count, names in WITHOUT_EFFECT.items():
        for name in names:
            takes = {"action": "store_true"} if count == "0" else {"nargs": None if count == "1" else count}
            group.add_argument(f"--{name}", dest=f"ignored_{name}", default=None, help=argparse.SUPPRESS, **takes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rectiflow serve", description="Serve the ComfyUI interface and its HTTP API from the embedded host."
    )
    for add in (_add_network, _add_folders, _add_execution, _add_process):
        add(parser)
    return parser


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.cache_lru < 0:
        parser.error(f"--cache-lru got {given.cache_lru}; allowed: 0 or more results")
    if given.cache_lru and given.cache_none:
        parser.error("--cache-lru and --cache-none exclude each other; give one of them")
    if not 16 <= given.preview_size <= 4096:
        parser.error(f"--preview-size got {given.preview_size}; allowed: 16 to 4096 pixels")
    if bool(given.tls_keyfile) != bool(given.tls_certfile):
        parser.error("--tls-keyfile and --tls-certfile are needed together")
    if given.front_end_version != DEFAULT_FRONT_END:
        parser.error("--front-end-version would download an interface; this host does not: unpack it and give --front-end-root DIR")


def parse_arguments(arguments: list[str] | None = None) -> ServerOptions:
    """Read the flags (sys.argv when None). A mistake prints one line and exits with status 2, as argparse does."""
    parser = _parser()
    given = parser.parse_args(arguments)
    _check(parser, given)
    ignored = [key.removeprefix("ignored_") for key, value in vars(given).items() if key.startswith("ignored_") and value]
    if ignored:
        logging.warning("Without effect on this host: %s", ", ".join(f"--{name}" for name in ignored))
    preview = "latent2rgb" if given.preview_method == "taesd" else given.preview_method
    dtype = "fp32" if given.fp32 else "fp16" if given.fp16 else "bf16" if given.bf16 else "auto"
    device = "cpu" if given.cpu else f"cuda:{given.default_device}" if given.default_device is not None else "auto"
    return ServerOptions(
        listen=tuple(address.strip() for address in given.listen.split(",") if address.strip()),
        port=given.port,
        tls_keyfile=given.tls_keyfile,
        tls_certfile=given.tls_certfile,
        cors_origin=given.enable_cors_header,
        trusted_hosts=tuple(name.lower() for name in given.trusted_host),
        base_directory=given.base_directory and given.base_directory.resolve(),
        output_directory=given.output_directory and given.output_directory.resolve(),
        input_directory=given.input_directory and given.input_directory.resolve(),
        temp_directory=given.temp_directory and given.temp_directory.resolve() / "temp",
        user_directory=given.user_directory,
        extra_model_paths=tuple(path for group in given.extra_model_paths_config for path in group),
        front_end_root=given.front_end_root,
        cache_lru=given.cache_lru,
        cache_none=given.cache_none,
        preview_size=given.preview_size,
        multi_user=given.multi_user,
        custom_nodes=not given.disable_all_custom_nodes,
        custom_nodes_kept=tuple(given.whitelist_custom_nodes),
        compress=given.enable_compress_response_body,
        auto_launch=given.auto_launch,
        quiet=given.dont_print_server,
        verbose=given.verbose,
        log_stdout=given.log_stdout,
        quick_test=given.quick_test_for_ci,
        cuda_visible=None if given.cuda_device is None else str(given.cuda_device),
        limits=Limits(upload_bytes=given.max_upload_size),
        host=HostSettings(device=device, dtype=dtype, preview_method=preview, disable_metadata=given.disable_metadata),
    )

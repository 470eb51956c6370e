"""GStreamer's RTSP server, run by the Python that has its bindings: ``/usr/bin/python3 rtsp_server.py --port 0``.

Serves H.264 at ``/camera`` and a stream without a picture at ``/sound``, prints its port, and ends with its parent.
"""

import argparse
import ctypes
import signal

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

PATHS = {
    "/camera": "( videotestsrc is-live=true pattern={pattern} ! video/x-raw,width={width},height={height},"
    "framerate={rate}/1 ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max={rate} ! rtph264pay "
    "name=pay0 config-interval=1 )",
    "/sound": "( audiotestsrc is-live=true ! alawenc ! rtppcmapay name=pay0 )",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", default="0")
    parser.add_argument("--user")
    parser.add_argument("--password")
    parser.add_argument("--basic", action="store_true", help="basic instead of digest authentication")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--rate", type=int, default=20)
    parser.add_argument("--pattern", default="smpte")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(arguments.port)
    if arguments.user:
        auth = GstRtspServer.RTSPAuth()
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        if arguments.basic:
            auth.add_basic(GstRtspServer.RTSPAuth.make_basic(arguments.user, arguments.password), token)
            auth.set_supported_methods(1)  # GstRtsp.RTSPAuthMethod.BASIC
        else:
            auth.add_digest(arguments.user, arguments.password, token)
            auth.set_supported_methods(2)  # GstRtsp.RTSPAuthMethod.DIGEST
        server.set_auth(auth)
    for path, pipeline in PATHS.items():
        factory = GstRtspServer.RTSPMediaFactory()
        factory.set_launch(pipeline.format(**vars(arguments)))
        factory.set_shared(True)
        if arguments.user:
            permissions = GstRtspServer.RTSPPermissions()
            permissions.add_role("viewer")
            permissions.add_permission_for_role("viewer", "media.factory.access", True)
            permissions.add_permission_for_role("viewer", "media.factory.construct", True)
            factory.set_permissions(permissions)
        server.get_mount_points().add_factory(path, factory)
    assert server.attach(None)
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()

"""The benchmarks' proxy, which makes a server far and narrow: bytes arrive whole, ends are handed on."""

import socket
import threading

from bench.throttle import Throttle


def test_bytes_pass_whole_in_both_directions_and_ends_are_handed_on():
    content = bytes(range(256)) * 20_000
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    heard.extend(data)
                connection.sendall(content)

        server = threading.Thread(target=answer)
        server.start()
        proxy = Throttle(listener.getsockname(), delay=0.0, rate=None)
        host, _, port = proxy.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(content)
            client.shutdown(socket.SHUT_WR)
            got = bytearray()
            while data := client.recv(1 << 16):
                got.extend(data)
        server.join(30)
        proxy.close()
    assert bytes(heard) == content
    assert bytes(got) == content

"""An S3 server on the loopback that goes away at SIGUSR1 and comes back at SIGUSR2.

python store_server.py PORT
"""

import signal
import sys

from moto.server import ThreadedMotoServer


def main(port: int) -> None:
    """Serve until killed."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    wanted = {signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    while True:
        if signal.sigwait(wanted) == signal.SIGUSR1:
            server.stop()
        else:
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
            server.start()


if __name__ == "__main__":
    main(int(sys.argv[1]))

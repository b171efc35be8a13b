"""Channels to servers of a node, of one SSH connection: nothing is sent over one after its CLOSE.

sshd ends the whole connection at such a message, or takes it for one of a new channel that has the same number. paramiko looks
whether a channel is open and sends after that, with no lock around both, and answers a CLOSE in the thread that reads. Here all
that a channel sends takes turns, and a CLOSE of sshd is answered by whoever uses the channel, at its end.
"""

import threading
from contextlib import suppress
from typing import Any, cast

import paramiko
from paramiko.common import MSG_CHANNEL_CLOSE, cMSG_CHANNEL_CLOSE


class OrderedChannel:
    """A connection of the node to one of its servers. Threads may share it; whoever opened it closes it."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._owed = not channel.closed  # a CLOSE that nobody has sent

    def recv(self, nbytes: int) -> bytes:
        """Some bytes as soon as there are any; none at the end. Raises OSError, EOFError."""
        return self._channel.recv(nbytes)

    def sendall(self, s: bytes) -> None:
        """Raises OSError once the channel is closed, EOFError with the connection."""
        while s:
            with self._sending:
                s = s[self._channel.send(s) :]

    def shutdown_write(self) -> None:
        """Tell the server that nothing more comes."""
        with self._sending:
            if not self._channel.closed:
                self._channel.shutdown_write()

    def close(self) -> None:
        """End both directions, and whatever waits for them. The connection that the channel goes over may have ended."""
        self.stop()
        with self._sending:
            if self._owed:
                self._owed = False
                message = paramiko.Message()
                message.add_byte(cMSG_CHANNEL_CLOSE)
                message.add_int(self._channel.remote_chanid)
                with suppress(OSError, EOFError):
                    cast(Any, self._channel).transport._send_user_message(message)

    def stop(self) -> None:
        """Begin to send nothing more, and wake who waits for bytes or for room; what has arrived is still to be read."""
        with self._channel.lock:
            cast(Any, self._channel)._set_closed()


class OrderedTransport(paramiko.Transport):
    """An SSH connection with ordered channels beside paramiko's own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._ordered: dict[int, OrderedChannel] = {}
        self._turn = threading.Lock()  # an answer of sshd to `open` may be followed by its CLOSE at once
        super().__init__(*args, **options)

    def connect_to(self, host: str, port: int, timeout_s: float) -> OrderedChannel:
        """Have the node connect to `host`:`port`. Raises what paramiko's open_channel does."""
        channel = self.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout_s)
        with self._turn:
            ordered = OrderedChannel(channel)
            if not channel.closed:
                self._ordered[channel.chanid] = ordered
        return ordered

    def closed_there(self, channel: paramiko.Channel, message: paramiko.Message) -> None:
        """sshd has sent a CLOSE. Called by the thread that reads, which must not wait for one that sends."""
        with self._turn:
            ordered = self._ordered.pop(channel.chanid, None)
            if ordered is None:
                return cast(None, cast(Any, channel)._handle_close(message))
        ordered.stop()
        cast(Any, self)._unlink_channel(channel.chanid)

    _channel_handler_table = {
        **cast(Any, paramiko.Transport)._channel_handler_table,
        MSG_CHANNEL_CLOSE: lambda channel, message: channel.transport.closed_there(channel, message),
    }

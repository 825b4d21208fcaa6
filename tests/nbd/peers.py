# Run by nbdsh (tests/nbd/peers.rs): libnbd against the export at $NBD_URI, of which the first 3 MiB are overwritten.
import errno
import os
import random

import nbd

uri, size = os.environ["NBD_URI"], int(os.environ["NBD_SIZE"])


def connect(structured=True, extended=False):
    h = nbd.NBD()
    h.set_strict_mode(0)  # What libnbd would refuse by itself has to be refused by the server.
    h.set_request_structured_replies(structured)
    if hasattr(h, "set_request_extended_headers"):
        h.set_request_extended_headers(extended)
    if structured:
        h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    assert h.get_size() == size
    return h


def fails(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum == code, f"{error}, not {errno.errorcode[code]}"
    else:
        raise AssertionError(f"{call} {args} succeeds")


def many_at_once(h, seed):
    """Reads and writes of disjoint pieces, all in flight together, then read back."""
    rng = random.Random(seed)
    model = bytearray(h.pread(1 << 20, 1 << 20))
    piece, begun = 4096, []
    for nth in rng.sample(range(256), 200):
        at = nth * piece
        if rng.random() < 0.5:
            data = rng.randbytes(piece)
            model[at : at + piece] = data
            begun.append((h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), (1 << 20) + at), None, None))
        else:
            buffer = nbd.Buffer(piece)
            begun.append((h.aio_pread(buffer, (1 << 20) + at), buffer, bytes(model[at : at + piece])))
    while h.aio_in_flight() > 0:
        h.poll(-1)
    for cookie, buffer, expected in begun:
        assert h.aio_command_completed(cookie)
        assert buffer is None or bytes(buffer.to_bytearray()) == expected
    assert h.pread(1 << 20, 1 << 20) == bytes(model)


def everything(h, structured):
    h.pwrite(b"a" * 5000, 300, nbd.CMD_FLAG_FUA)
    assert h.pread(5000, 300) == b"a" * 5000
    h.zero(1000, 1000)
    assert h.pread(3000, 500) == b"a" * 500 + bytes(1000) + b"a" * 1500
    h.zero(65536, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    h.trim(65536, 65536)
    h.cache(65536, 0)
    h.flush()
    try:
        h.zero(65536, 65536, nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as error:
        assert error.errnum == errno.ENOTSUP
    assert h.pread(131072, 0) == bytes(131072)
    fails(errno.EINVAL, h.pread, 1, size)
    fails(errno.EINVAL, h.pread, 512, size - 511)
    fails(errno.ENOSPC, h.pwrite, b"x" * 512, size - 511)
    fails(errno.ENOSPC, h.zero, 512, size)
    fails(errno.EINVAL, h.trim, 512, size)
    fails(errno.EINVAL, h.pread, 512, 0, 1 << 9)
    h.pwrite(b"z", size - 1)
    assert h.pread(1, size - 1) == b"z"
    if structured:
        extents, chunks = [], []
        h.block_status(1 << 20, 65536, lambda context, offset, entries, error: extents.append((context, offset, entries)))
        assert extents[0][:2] == ("base:allocation", 65536) and sum(extents[0][2][0::2]) > 0
        assert extents[0][2][1] == 3, "zeroed and trimmed is a hole"
        h.block_status(4096, 65536, lambda *status: extents.append(status), nbd.CMD_FLAG_REQ_ONE)
        assert extents[-1][2] == [4096, 3]
        note = lambda data, offset, status, error: chunks.append((len(data), offset, status))
        h.pread_structured(131072, 0, note, nbd.CMD_FLAG_DF)
        assert chunks == [(131072, 0, nbd.READ_DATA)], chunks
    else:
        fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
    many_at_once(h, 7)


for structured in [False, True]:
    h = connect(structured)
    assert h.get_structured_replies_negotiated() == structured
    everything(h, structured)
    h.shutdown()

if hasattr(nbd.NBD(), "set_request_extended_headers"):
    h = connect(extended=True)
    assert h.get_extended_headers_negotiated()
    everything(h, True)
    entries = []
    h.block_status_64(size, 0, lambda context, offset, extents, error: entries.extend(extents))
    assert entries
    h.shutdown()
else:
    print("no extended headers")

# A flush here covers what was acknowledged there.
a, b = connect(), connect()
assert a.can_multi_conn()
a.pwrite(b"m" * 4096, 8192)
b.flush()
assert b.pread(4096, 8192) == b"m" * 4096
print("all is well")

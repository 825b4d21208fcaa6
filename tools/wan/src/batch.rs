//! Many datagrams in one system call: `recvmmsg` and `sendmmsg`. The unsafe code that hands buffers to the
//! kernel is here. Must not know: the link, clients.
//!
//! UDP_GRO is never asked for, so the kernel hands over single datagrams even where the sender used segmentation
//! offload.

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::libc;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

/// Most datagrams in one call.
pub const BATCH: usize = 64;

/// Room for one datagram: the largest UDP payload is 65,507 bytes.
pub const DATAGRAM_MAX: usize = 65_536;

/// A datagram to send, and where to; `None` on a connected socket.
pub type Outgoing<'a> = (Option<SocketAddr>, &'a [u8]);

/// The buffers for receiving. Pages that no datagram touches cost no memory.
pub struct Receiver {
    buffers: Vec<u8>,
    received: Vec<(usize, Option<SocketAddr>)>,
}

impl Default for Receiver {
    fn default() -> Receiver {
        Receiver { buffers: vec![0; BATCH * DATAGRAM_MAX], received: Vec::with_capacity(BATCH) }
    }
}

impl Receiver {
    /// Takes what has arrived, at most [`BATCH`] datagrams, without waiting; returns how many.
    ///
    /// # Errors
    /// What `recvmmsg` says; nothing waiting is `WouldBlock`.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.received.clear();
        // SAFETY: all three are plain C structures for which all-zero is a valid value (null pointers, no lengths).
        let mut addresses: [libc::sockaddr_storage; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
        let mut slices: [libc::iovec; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
        for (i, buffer) in self.buffers.chunks_exact_mut(DATAGRAM_MAX).enumerate() {
            slices[i] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            let header = &mut headers[i].msg_hdr;
            header.msg_iov = &raw mut slices[i];
            header.msg_iovlen = 1;
            header.msg_name = (&raw mut addresses[i]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        }
        // SAFETY: every header points to one slice and one address that outlive the call; the slices cover disjoint
        // parts of `buffers`, which is borrowed mutably; the count is the number of headers.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        for (header, address) in headers.iter().zip(&addresses).take(count as usize) {
            self.received.push((header.msg_len as usize, socket_address(address)));
        }
        Ok(self.received.len())
    }

    /// The payloads of the last [`Receiver::receive`], with the sender where the kernel named one.
    pub fn datagrams(&self) -> impl Iterator<Item = (Option<SocketAddr>, &[u8])> {
        let slots = self.buffers.chunks_exact(DATAGRAM_MAX);
        self.received.iter().zip(slots).map(|((len, from), slot)| (*from, &slot[..*len]))
    }
}

/// Sends datagrams in order, at most [`BATCH`], without waiting; returns how many went out.
///
/// # Errors
/// What `sendmmsg` says of the *first* datagram; an error at a later one shows when that one is first.
pub fn send(socket: BorrowedFd<'_>, datagrams: &[Outgoing<'_>]) -> io::Result<usize> {
    let count = datagrams.len().min(BATCH);
    let names: Vec<Option<SockaddrStorage>> =
        datagrams[..count].iter().map(|(to, _)| to.map(SockaddrStorage::from)).collect();
    // SAFETY: plain C structures for which all-zero is a valid value.
    let mut slices: [libc::iovec; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
    let mut headers: [libc::mmsghdr; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
    for (i, (_, payload)) in datagrams[..count].iter().enumerate() {
        slices[i] = libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
        let header = &mut headers[i].msg_hdr;
        header.msg_iov = &raw mut slices[i];
        header.msg_iovlen = 1;
        if let Some(name) = &names[i] {
            header.msg_name = name.as_ptr().cast_mut().cast();
            header.msg_namelen = name.len();
        }
    }
    // SAFETY: every header points to one slice and at most one name that outlive the call; the kernel only reads them.
    let sent = unsafe {
        libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count as libc::c_uint, libc::MSG_DONTWAIT as _)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

fn socket_address(raw: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(raw.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the kernel wrote a sockaddr_in, which is smaller and no stricter aligned.
            let v4 = unsafe { &*ptr::from_ref(raw).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above, with sockaddr_in6.
            let v6 = unsafe { &*ptr::from_ref(raw).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    fn round_trip(bind: &str) {
        let (a, b) = (UdpSocket::bind(bind).unwrap(), UdpSocket::bind(bind).unwrap());
        let to = b.local_addr().unwrap();
        let large = vec![7u8; 60_000];
        let payloads: [&[u8]; 4] = [b"one", b"", &large, b"four"];
        let datagrams: Vec<Outgoing> = payloads.iter().map(|p| (Some(to), *p)).collect();
        assert_eq!(send(a.as_fd(), &datagrams).unwrap(), 4);
        let mut receiver = Receiver::default();
        assert_eq!(receiver.receive(b.as_fd()).unwrap(), 4);
        for ((from, got), sent) in receiver.datagrams().zip(payloads) {
            assert_eq!(from, Some(a.local_addr().unwrap()));
            assert_eq!(got, sent);
        }
        assert_eq!(receiver.receive(b.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn batches_keep_order_sizes_and_addresses() {
        round_trip("127.0.0.1:0");
        if UdpSocket::bind("[::1]:0").is_ok() {
            round_trip("[::1]:0");
        }
    }
}

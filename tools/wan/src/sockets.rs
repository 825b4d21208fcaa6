//! UDP sockets as the relay needs them: never blocking, with large buffers, and their kernel's drop counter.
//! Must not know: the link, clients.

use std::io;
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

/// What is asked of the kernel for each direction of each socket, in bytes: 64 ms at 1 Gbit/s. The kernel may grant
/// less.
pub const BUFFER_BYTES: usize = 8 << 20;

/// A socket that clients send to.
///
/// # Errors
/// What `bind` says.
pub fn listening(address: SocketAddr) -> io::Result<UdpSocket> {
    prepared(UdpSocket::bind(address)?)
}

/// A socket that talks to the target alone.
///
/// # Errors
/// What `socket` and `connect` say.
pub fn connected(target: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    prepared(socket)
}

fn prepared(socket: UdpSocket) -> io::Result<UdpSocket> {
    socket.set_nonblocking(true)?;
    // The forced form passes net.core.{r,w}mem_max for those who may; the others get what the limit leaves. A buffer
    // that is too small shows as `dropped_relay`, so nothing is hidden when both are refused.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)
        .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES));
    let _ = setsockopt(&socket, sockopt::SndBufForce, &BUFFER_BYTES)
        .or_else(|_| setsockopt(&socket, sockopt::SndBuf, &BUFFER_BYTES));
    Ok(socket)
}

/// Place of the drop counter in what SO_MEMINFO gives (linux/sock_diag.h: SK_MEMINFO_DROPS).
const MEMINFO_DROPS: usize = 8;

/// How many datagrams the kernel dropped because this socket's receive buffer was full; 0 where it does not tell.
pub fn kernel_drops(socket: &UdpSocket) -> u64 {
    let mut info = [0u32; MEMINFO_DROPS + 1];
    let mut len = mem::size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, which is that large.
    let status = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    if status == 0 { u64::from(info[MEMINFO_DROPS]) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_counts_what_does_not_fit() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        setsockopt(&receiver, sockopt::RcvBuf, &4096).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..100 {
            sender.send_to(&[0; 1000], receiver.local_addr().unwrap()).unwrap();
        }
        let drops = kernel_drops(&receiver);
        assert!((50..100).contains(&drops), "{drops}");
    }
}

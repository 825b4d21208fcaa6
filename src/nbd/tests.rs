//! A server on a Unix socket, and clients of every temper.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::testing::*;
use super::{ListenError, NbdAddr, NbdErrno, NbdLimits, NbdListen, NbdServer};
use crate::core::nbd::ReplyStyle;
use crate::core::nbd::wire::{cmd, cmd_flag, opt, rep};

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
const MIB: usize = 1 << 20;

/// Nothing here may hang: a test that does fails by name.
async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test hangs")
}

#[tokio::test]
async fn what_is_written_is_read_in_every_style_by_both_paths() {
    within(async {
        for at_once in [false, true] {
            let disk = MemoryDisk::new(8 * MIB);
            disk.at_once.store(at_once, Ordering::SeqCst);
            let served = serve(&disk).await;
            for style in STYLES {
                let mut client = Client::connect(&served.path, style).await;
                for (offset, len) in [(0, 1), (511, 2), (4095, 4098), (65536, 16384), (1 << 20, 100_000), (77, 3 * MIB)]
                {
                    client.write_and_read_back(offset, len).await;
                }
                client.leave().await;
            }
            assert!(served.server.shutdown().await);
        }
    })
    .await;
}

#[tokio::test]
async fn requests_cut_into_single_bytes_are_understood() {
    within(async {
        let disk = MemoryDisk::new(MIB);
        let served = serve(&disk).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Extended).await;
        let data = pattern(0, 600);
        let mut write = client.header(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 1, 100, 600);
        write.extend(&data);
        let read = client.header(cmd::READ, 0, 2, 100, 600);
        for (bytes, cookie, expected) in [(write, 1, vec![]), (read, 2, data)] {
            for byte in bytes {
                client.stream.write_all(&[byte]).await.expect("sends");
                tokio::task::yield_now().await;
            }
            let reply = client.reply().await;
            assert_eq!((reply.cookie, reply.error, reply.data), (cookie, 0, expected));
        }
    })
    .await;
}

#[tokio::test]
async fn replies_come_in_the_order_in_which_they_are_ready() {
    within(async {
        for style in STYLES {
            let disk = MemoryDisk::patterned(2 * MIB);
            disk.answer_reads_in_reverse(256);
            let served = serve(&disk).await;
            let mut client = Client::connect(&served.path, style).await;
            for nth in 0..256u64 {
                client.send(cmd::READ, 0, nth.wrapping_mul(0x9e37_79b9_7f4a_7c15), nth * 4096, 4096).await;
            }
            for nth in (0..256u64).rev() {
                let reply = client.reply().await;
                assert_eq!(reply.cookie, nth.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                assert!(reply.data == pattern(nth as usize * 4096, 4096));
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_read_does_not_wait_behind_writes() {
    within(async {
        let disk = MemoryDisk::patterned(4 * MIB);
        disk.hold(0..MIB as u64);
        let served = serve(&disk).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Structured).await;
        for nth in 0..100 {
            client.send_write(nth, nth * 4096, &[7; 4096]).await;
        }
        client.send(cmd::READ, 0, 1000, 2 * MIB as u64, 4096).await;
        assert_eq!(client.reply().await.cookie, 1000);
        disk.hold(0..0);
        for _ in 0..100 {
            assert_eq!(client.reply().await.error, 0);
        }
    })
    .await;
}

#[tokio::test]
async fn a_write_that_hangs_in_the_disk_holds_up_nothing_else_of_its_client() {
    within(async {
        for style in STYLES {
            let disk = MemoryDisk::patterned(MIB);
            disk.at_once.store(true, Ordering::SeqCst);
            let served = serve(&disk).await;
            let mut client = Client::connect(&served.path, style).await;
            let hang = |disk: &MemoryDisk| disk.hang_next_write();
            for round in 0..3 {
                let release = hang(&disk);
                let begun = disk.writes_begun.load(Ordering::SeqCst);
                client.send_write(5, 4096, &[round; 600]).await;
                until("the write", || disk.writes_begun.load(Ordering::SeqCst) > begun).await;
                // Another thread goes on with whatever comes, be it longer than a page or in the middle of a payload.
                assert!(client.read(65536, 4096).await == pattern(65536, 4096), "{style:?}");
                assert_eq!(client.write(131_072, &pattern(0, 100_000)).await, 0);
                assert!(client.read(131_072, 100_000).await == pattern(0, 100_000));
                assert_eq!(client.call(cmd::FLUSH, 0, 0, 0).await.error, 0);
                release.send(()).expect("it hangs");
                let reply = client.reply().await;
                assert_eq!((reply.cookie, reply.error), (5, 0));
                assert!(client.read(4096, 600).await == [round; 600]);
                // It is careful for a while, then serves at once again.
                tokio::time::sleep(Duration::from_millis(2000)).await;
                assert_eq!(client.write(0, &[round; 512]).await, 0);
            }
            // One that leaves while its write hangs: the write is finished, and the server waits for it.
            let release = hang(&disk);
            client.send_write(6, 8192, &[9; 512]).await;
            until("the write", || disk.writes_begun.load(Ordering::SeqCst) > 3).await;
            client.send(cmd::DISC, 0, 0, 0, 0).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(release);
            assert_eq!(client.reply().await.cookie, 6);
            client.expect_end().await;
            assert!(served.server.shutdown().await);
            assert!(disk.bytes_at(8192, 512) == [9; 512]);
        }
    })
    .await;
}

#[tokio::test]
async fn a_flush_of_a_client_that_never_wrote_succeeds() {
    within(async {
        let disk = MemoryDisk::new(MIB);
        disk.read_only.store(true, Ordering::SeqCst);
        let served = serve(&disk).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        assert_eq!(client.call(cmd::FLUSH, 0, 0, 0).await.error, 0);
        assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
        let perm = NbdErrno::Perm.to_wire();
        assert_eq!(client.write(0, &[1; 100_000]).await, perm);
        assert_eq!(client.call(cmd::TRIM, 0, 0, 512).await.error, perm);
        assert_eq!(client.call(cmd::WRITE_ZEROES, 0, 0, 512).await.error, perm);
        assert_eq!(client.read(0, 512).await, [0; 512]);
    })
    .await;
}

#[tokio::test]
async fn the_whole_disk_can_be_trimmed_and_zeroed() {
    within(async {
        for kind in [cmd::TRIM, cmd::WRITE_ZEROES] {
            let disk = MemoryDisk::patterned(64 * MIB);
            let served = serve(&disk).await;
            let mut client = Client::connect_with(&served.path, ReplyStyle::Extended, &["base:allocation"]).await;
            assert_eq!(client.call(kind, cmd_flag::FUA, 0, 64 * MIB as u64).await.error, 0);
            let status = client.call(cmd::BLOCK_STATUS, 0, 0, 64 * MIB as u64).await.status;
            assert_eq!(status.len(), 1);
            assert_eq!(status[0].1, [(8 * MIB as u64, 3)], "2048 extents of 4096 bytes, merged");
            let reply = client.call(cmd::READ, 0, MIB as u64, 4096).await;
            assert_eq!((reply.holes, reply.data), (1, vec![0; 4096]), "zeroes are not sent");
            let reply = client.call(cmd::READ, cmd_flag::DF, MIB as u64, 4096).await;
            assert_eq!((reply.holes, reply.data), (0, vec![0; 4096]), "unless they have to be");
        }
    })
    .await;
}

#[tokio::test]
async fn errors_are_those_that_the_protocol_allows() {
    within(async {
        let served = serve(&MemoryDisk::new(MIB)).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Structured).await;
        let fast = client.call(cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 0, 4096).await;
        assert_eq!(fast.error, NbdErrno::NotSup.to_wire());
        let slow = client.call(cmd::WRITE_ZEROES, cmd_flag::NO_HOLE, 0, 4096).await;
        assert_eq!(slow.error, NbdErrno::Inval.to_wire(), "ENOTSUP is for FAST_ZERO alone");
        assert_eq!(client.call(cmd::READ, 0, MIB as u64, 1).await.error, NbdErrno::Inval.to_wire());
        assert_eq!(client.call(99, 0, 0, 1).await.error, NbdErrno::Inval.to_wire());
        // The payload of a write that fails is no request.
        let fake = client.header(cmd::READ, 0, 5, 0, 512).repeat(3000);
        assert_eq!(client.write(MIB as u64 - 1, &fake).await, NbdErrno::NoSpc.to_wire());
        assert_eq!(client.read(0, 1).await, [0]);
    })
    .await;
}

#[tokio::test]
async fn disc_and_half_close_wait_for_what_is_in_flight() {
    within(async {
        for half_close in [false, true] {
            let disk = MemoryDisk::new(MIB);
            disk.hold(0..MIB as u64);
            let served = serve(&disk).await;
            let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
            for nth in 0..32 {
                client.send_write(nth, nth * 4096, &[9; 4096]).await;
            }
            if half_close {
                client.stream.shutdown().await.expect("shuts down");
            } else {
                let mut last = client.header(cmd::DISC, 0, 0, 0, 0);
                last.extend(client.header(cmd::WRITE, 0, 99, 0, 512));
                last.extend([1; 512]);
                client.stream.write_all(&last).await.expect("sends");
            }
            until("32 writes", || disk.writes_begun.load(Ordering::SeqCst) == 32).await;
            disk.hold(0..0);
            let mut cookies = Vec::new();
            for _ in 0..32 {
                let reply = client.reply().await;
                assert_eq!(reply.error, 0);
                cookies.push(reply.cookie);
            }
            cookies.sort_unstable();
            assert_eq!(cookies, (0..32).collect::<Vec<_>>());
            client.expect_end().await;
            assert_eq!(disk.bytes_at(0, 32 * 4096), [9; 32 * 4096], "and nothing after DISC");
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_payload_leaves_no_trace() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        let served = serve(&disk).await;
        for sent in [0, 100, 20_000, 500_000] {
            let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
            let mut bytes = client.header(cmd::WRITE, 0, 1, 0, 600_000);
            bytes.resize(bytes.len() + sent, 0xee);
            client.stream.write_all(&bytes).await.expect("sends");
        }
        until("the end of all connections", || served.server.connections() == 0).await;
        assert!(disk.bytes_at(0, MIB) == pattern(0, MIB));
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        assert!(client.read(0, 4096).await == pattern(0, 4096));
    })
    .await;
}

#[tokio::test]
async fn writes_of_a_client_that_vanished_are_finished_and_its_reads_dropped() {
    within(async {
        let disk = MemoryDisk::patterned(4 * MIB);
        disk.hold(0..4 * MIB as u64);
        let served = serve(&disk).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        for nth in 0..16 {
            client.send(cmd::READ, 0, nth, 2 * MIB as u64, 4096).await;
            client.send_write(nth + 100, nth * 4096, &[5; 4096]).await;
        }
        until("the writes", || disk.writes_begun.load(Ordering::SeqCst) == 16).await;
        drop(client);
        // Reads are still held; the writes are let go.
        disk.hold(2 * MIB as u64..4 * MIB as u64);
        until("the end of the connection", || served.server.connections() == 0).await;
        assert_eq!(disk.writes_done.load(Ordering::SeqCst), 16);

        // With nothing but reads under way, there is no answer that would tell.
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        client.send(cmd::READ, 0, 1, 2 * MIB as u64, 4096).await;
        until("the read", || disk.reads_begun.load(Ordering::SeqCst) == 17).await;
        drop(client);
        until("the end of the connection", || served.server.connections() == 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_takes_no_replies_holds_up_nobody_and_gets_them_later() {
    within(async {
        for at_once in [false, true] {
            let disk = MemoryDisk::patterned(2 * MIB);
            disk.at_once.store(at_once, Ordering::SeqCst);
            let limits = NbdLimits { connection_bytes: 16 << 20, ..NbdLimits::default() };
            let served = serve_with(&disk, limits).await;
            let mut lazy = Vec::new();
            for _ in 0..4 {
                let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
                for cookie in 0..64 {
                    client.send(cmd::READ, 0, cookie, 0, MIB as u64).await;
                }
                lazy.push(client);
            }
            let mut busy = Client::connect(&served.path, ReplyStyle::Structured).await;
            for _ in 0..20 {
                assert_eq!(busy.write(MIB as u64, &[3; 65536]).await, 0);
                assert_eq!(busy.read(MIB as u64, 65536).await, [3; 65536]);
            }
            assert!(
                disk.reads_begun.load(Ordering::SeqCst) <= 4 * 18 + 20,
                "what lazy clients can hold is bounded: {} reads were begun",
                disk.reads_begun.load(Ordering::SeqCst)
            );
            let expected = disk.bytes_at(0, MIB);
            for client in &mut lazy {
                for _ in 0..64 {
                    assert!(client.reply().await.data == expected);
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn clients_that_hold_all_memory_hold_up_nobody() {
    within(async {
        let disk = MemoryDisk::patterned(48 * MIB);
        let limits = NbdLimits { total_bytes: 64 << 20, ..NbdLimits::default() };
        let served = serve_with(&disk, limits).await;
        // One announces a large write and sends nothing of it, the other asks for much and takes nothing.
        let mut writer = Client::connect(&served.path, ReplyStyle::Simple).await;
        let header = writer.header(cmd::WRITE, 0, 1, 0, 32 << 20);
        writer.stream.write_all(&header).await.expect("sends");
        let mut reader = Client::connect(&served.path, ReplyStyle::Simple).await;
        reader.send(cmd::READ, 0, 1, 0, 32 << 20).await;
        until("the large read", || disk.reads_begun.load(Ordering::SeqCst) == 1).await;
        for style in STYLES {
            let mut client = Client::connect(&served.path, style).await;
            for (offset, len) in [(3, 3 * MIB + 1), (40 << 20, 1 << 18), (8 << 20, 32 * MIB), (99, (1 << 18) + 1)] {
                let data = pattern(offset as usize + 8, len);
                assert_eq!(client.write(offset, &data).await, 0, "{style:?} {len}");
                assert!(client.read(offset, len as u64).await == data, "{style:?} {len}");
                let df = if style == ReplyStyle::Simple { 0 } else { cmd_flag::DF };
                assert!(client.call(cmd::READ, df, offset, len as u64).await.data == data, "{style:?} {len}");
            }
            // Other requests before and behind one that is run in pieces.
            let data = pattern(16, MIB);
            for cookie in 0..9 {
                client.send_write(cookie, cookie << 20, &data).await;
                client.send(cmd::READ, 0, cookie + 100, 47 << 20, 4096).await;
            }
            for _ in 0..18 {
                assert_eq!(client.reply().await.error, 0);
            }
            for cookie in 0..9 {
                assert!(disk.bytes_at(cookie << 20, MIB) == data);
            }
        }
    })
    .await;
}

#[tokio::test]
async fn the_number_of_requests_in_flight_is_bounded() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        disk.hold(0..MIB as u64);
        let served = serve_with(&disk, NbdLimits { max_requests: 8, ..NbdLimits::default() }).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        for cookie in 0..100 {
            client.send(cmd::READ, 0, cookie, cookie * 512, 512).await;
        }
        until("8 reads", || disk.reads_begun.load(Ordering::SeqCst) == 8).await;
        let mut other = Client::connect(&served.path, ReplyStyle::Simple).await;
        assert_eq!(other.call(cmd::FLUSH, 0, 0, 0).await.error, 0);
        assert_eq!(disk.reads_begun.load(Ordering::SeqCst), 8);
        disk.hold(0..0);
        for _ in 0..100 {
            let reply = client.reply().await;
            assert_eq!(reply.data, pattern(reply.cookie as usize * 512, 512));
        }
    })
    .await;
}

#[tokio::test]
async fn garbage_drops_that_connection_and_only_that() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        let served = serve(&disk).await;
        let mut other = Client::connect(&served.path, ReplyStyle::Structured).await;
        for style in STYLES {
            for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[0; 5000]] {
                let mut client = Client::connect(&served.path, style).await;
                let _ = client.stream.write_all(garbage).await;
                client.expect_end().await;
                assert!(other.read(0, 512).await == pattern(0, 512));
            }
        }
        let mut client = Client::connect(&served.path, ReplyStyle::Extended).await;
        let endless = client.header(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 1, 0, u64::MAX);
        client.stream.write_all(&endless).await.expect("sends");
        client.expect_end().await;
    })
    .await;
}

#[tokio::test]
async fn hostile_handshakes_get_nothing_and_hold_up_nobody() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        let limits = NbdLimits { max_handshakes: 8, ..NbdLimits::default() };
        let served = serve_with(&disk, limits).await;
        for hostile in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[0xff; 4],
            b"\0\0\0\x03\0\0\0\0",
            b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff",
            b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04nope",
        ] {
            let mut stream = greeted(&served.path).await;
            let _ = stream.write_all(hostile).await;
            expect_end(&mut stream).await;
        }
        // More who never finish than there may be: each new one ends the oldest.
        let mut idle = Vec::new();
        for _ in 0..30 {
            idle.push(greeted(&served.path).await);
            idle.last_mut().expect("just pushed").write_all(b"\0\0\0\x03IHAVE").await.expect("sends");
        }
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        assert!(client.read(0, 512).await == pattern(0, 512));
        expect_end(&mut idle[0]).await;
    })
    .await;
}

#[tokio::test]
async fn a_handshake_has_a_deadline() {
    within(async {
        let limits = NbdLimits { handshake_timeout: Duration::from_millis(20), ..NbdLimits::default() };
        let served = serve_with(&MemoryDisk::new(MIB), limits).await;
        let mut stream = greeted(&served.path).await;
        expect_end(&mut stream).await;
    })
    .await;
}

#[tokio::test]
async fn options_without_transmission() {
    within(async {
        let served = serve(&MemoryDisk::new(MIB)).await;
        let mut stream = greeted(&served.path).await;
        stream.write_all(b"\0\0\0\x03").await.expect("sends");
        ask(&mut stream, opt::LIST, &[]).await;
        assert_eq!(ask_for(&mut stream, opt::GO, b"\0\0\0\x05later\0\0").await, rep::ERR_POLICY);
        assert_eq!(ask_for(&mut stream, opt::GO, b"\0\0\0\x04none\0\0").await, rep::ERR_UNKNOWN);
        ask(&mut stream, opt::INFO, b"\0\0\0\0\0\0").await;
        ask(&mut stream, opt::ABORT, &[]).await;
        expect_end(&mut stream).await;
    })
    .await;
}

#[tokio::test]
async fn as_many_connections_as_allowed_and_no_more() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        let served = serve_with(&disk, NbdLimits { max_connections: 3, ..NbdLimits::default() }).await;
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(Client::connect(&served.path, ReplyStyle::Simple).await);
        }
        until("three connections", || served.server.connections() == 3).await;
        let mut stream = UnixStream::connect(&served.path).await.expect("connects");
        expect_end(&mut stream).await;
        drop(clients.pop());
        until("two connections", || served.server.connections() == 2).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        assert!(client.read(0, 512).await == pattern(0, 512));
    })
    .await;
}

#[tokio::test]
async fn shutdown_answers_what_is_in_flight() {
    within(async {
        let disk = MemoryDisk::new(MIB);
        disk.hold(0..MIB as u64);
        let served = serve(&disk).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        client.send_write(1, 0, &[4; 4096]).await;
        let mut half = Client::connect(&served.path, ReplyStyle::Simple).await;
        let bytes = [half.header(cmd::WRITE, 0, 1, 8192, 100_000), vec![4; 50_000]].concat();
        half.stream.write_all(&bytes).await.expect("sends");
        until("the write", || disk.writes_begun.load(Ordering::SeqCst) == 1).await;
        let path = served.path.clone();
        let shutdown = tokio::spawn(served.server.shutdown());
        half.expect_end().await;
        until("the end of the listener", || !path.exists()).await;
        assert!(UnixStream::connect(&path).await.is_err());
        disk.hold(0..0);
        assert_eq!(client.reply().await.error, 0);
        client.expect_end().await;
        drop((client, half));
        assert!(shutdown.await.expect("no panic"));
        assert_eq!(disk.bytes_at(0, 4096), [4; 4096]);
        assert_eq!(disk.bytes_at(8192, 4096), [0; 4096], "half a write is none");
    })
    .await;
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_ever() {
    within(async {
        let disk = MemoryDisk::new(MIB);
        disk.hold(0..MIB as u64);
        let limits = NbdLimits { shutdown_grace: Duration::from_millis(50), ..NbdLimits::default() };
        let served = serve_with(&disk, limits).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
        client.send_write(1, 0, &[4; 4096]).await;
        until("the write", || disk.writes_begun.load(Ordering::SeqCst) == 1).await;
        assert!(!served.server.shutdown().await);
        client.expect_end().await;
    })
    .await;
}

async fn listen(path: &Path) -> Result<NbdServer, ListenError> {
    let exports = std::sync::Arc::new(Disks(vec![("disk", MemoryDisk::new(MIB))]));
    NbdServer::listen(&[NbdListen::Unix(path.to_owned())], exports, NbdLimits::default()).await
}

#[tokio::test]
async fn socket_files_are_replaced_only_when_nobody_listens() {
    within(async {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("binds"));
        assert!(path.exists(), "a socket that a dead process left");
        let server = listen(&path).await.expect("takes it over");
        assert!(matches!(listen(&path).await, Err(ListenError::InUse { .. })));
        assert!(server.shutdown().await);
        assert!(!path.exists());

        std::fs::write(&path, "data").expect("writes");
        assert!(matches!(listen(&path).await, Err(ListenError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).expect("is there"), b"data");
        assert!(matches!(listen(&dir.path().join("no/s")).await, Err(ListenError::Io { .. })));

        // Another's socket that took the place meanwhile is left alone.
        std::fs::remove_file(&path).expect("removes");
        let server = listen(&path).await.expect("listens");
        std::fs::remove_file(&path).expect("removes");
        let _other = std::os::unix::net::UnixListener::bind(&path).expect("binds");
        assert!(server.shutdown().await);
        assert!(path.exists());
    })
    .await;
}

#[tokio::test]
async fn tcp_and_unix_at_once() {
    within(async {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let exports = std::sync::Arc::new(Disks(vec![("disk", MemoryDisk::new(MIB))]));
        let listeners = [NbdListen::Unix(dir.path().join("s")), NbdListen::Tcp("127.0.0.1:0".to_owned())];
        let server = NbdServer::listen(&listeners, exports.clone(), NbdLimits::default()).await.expect("listens");
        let [NbdAddr::Unix(path), NbdAddr::Tcp(addr)] = server.local_addrs() else {
            panic!("{:?}", server.local_addrs());
        };
        Client::connect(path, ReplyStyle::Simple).await;
        let mut stream = tokio::net::TcpStream::connect(addr).await.expect("connects");
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.expect("sends");
        let mut greeting = [0; 18 + 10];
        stream.read_exact(&mut greeting).await.expect("greeting and size");
        assert_eq!(greeting[18..26], (MIB as u64).to_be_bytes());
        drop(stream);
        let taken = NbdListen::Tcp(addr.to_string());
        assert!(matches!(
            NbdServer::listen(&[taken], exports.clone(), NbdLimits::default()).await,
            Err(ListenError::Io { .. })
        ));
        assert!(matches!(NbdServer::listen(&[], exports, NbdLimits::default()).await, Err(ListenError::NoAddress)));
        assert!(server.shutdown().await);
    })
    .await;
}

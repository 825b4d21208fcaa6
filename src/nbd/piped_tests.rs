//! Longer requests, whose bytes go through pipes: with clients that send in crumbs, hang up, or take no replies, and exports that
//! hang, refuse, or would rather not.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::NbdErrno;
use super::testing::*;
use crate::core::nbd::ReplyStyle;
use crate::core::nbd::wire::{cmd, cmd_flag};
use crate::pipe::PIPE_MAX_BYTES;

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
const MIB: usize = 1 << 20;
const LONGEST: u64 = PIPE_MAX_BYTES as u64;

async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test hangs")
}

fn piped(disk: &MemoryDisk) -> usize {
    disk.piped.load(Ordering::SeqCst)
}

#[tokio::test]
async fn lengths_around_the_limits_and_what_follows_them() {
    within(async {
        for declines in [false, true] {
            let disk = MemoryDisk::new(4 * MIB);
            disk.at_once.store(true, Ordering::SeqCst);
            disk.declines_pipes.store(declines, Ordering::SeqCst);
            let served = serve(&disk).await;
            for style in STYLES {
                let mut client = Client::connect(&served.path, style).await;
                // Several in one segment, long and short in turn, and the reads of them behind.
                let lens =
                    [512, 32_767, 32_768, 1, LONGEST - 1, LONGEST, 100, LONGEST + 1, 40_000, LONGEST, LONGEST, 16_385];
                let mut bytes = Vec::new();
                let mut at = 7;
                for (nth, len) in lens.into_iter().enumerate() {
                    let flags = if style == ReplyStyle::Extended { cmd_flag::PAYLOAD_LEN } else { 0 };
                    let flags = flags | if nth == 5 { cmd_flag::FUA } else { 0 };
                    bytes.extend(client.header(cmd::WRITE, flags, nth as u64, at, len));
                    bytes.extend(pattern(at as usize, len as usize));
                    at += len;
                }
                client.stream.write_all(&bytes).await.expect("sends");
                for _ in lens {
                    assert_eq!(client.reply().await.error, 0);
                }
                assert!(disk.bytes_at(7, at as usize - 7) == pattern(7, at as usize - 7), "{style:?}");
                let mut at = 7;
                for (nth, len) in lens.into_iter().enumerate() {
                    let flags = if nth % 2 == 0 && style != ReplyStyle::Simple { cmd_flag::DF } else { 0 };
                    client.send(cmd::READ, flags, nth as u64, at, len).await;
                    at += len;
                }
                for _ in lens {
                    let reply = client.reply().await;
                    let before: u64 = lens[..reply.cookie as usize].iter().sum();
                    let expected = pattern(7 + before as usize, lens[reply.cookie as usize] as usize);
                    assert!(reply.data == expected, "{style:?} {}", reply.cookie);
                }
            }
            assert_eq!(piped(&disk) > 0, !declines);
        }
    })
    .await;
}

/// Each crumb takes up a page of the pipe.
#[tokio::test]
async fn a_payload_in_crumbs() {
    within(async {
        let disk = MemoryDisk::new(MIB);
        disk.at_once.store(true, Ordering::SeqCst);
        let served = serve(&disk).await;
        let mut client = Client::connect(&served.path, ReplyStyle::Structured).await;
        for crumb in [100, 1500, 5000] {
            let data = pattern(crumb, PIPE_MAX_BYTES);
            let mut bytes = client.header(cmd::WRITE, 0, 1, 4096, LONGEST);
            bytes.extend(&data);
            for crumb in bytes.chunks(crumb) {
                client.stream.write_all(crumb).await.expect("sends");
            }
            assert_eq!(client.reply().await.cookie, 1);
            assert!(client.read(4096, LONGEST).await == data, "in crumbs of {crumb}");
        }
    })
    .await;
}

/// The pipe has no room left, the payload is not complete, and there is nothing in the socket but its end.
#[tokio::test]
async fn a_client_that_vanishes_when_its_crumbs_have_filled_the_pipe() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        disk.at_once.store(true, Ordering::SeqCst);
        let served = serve(&disk).await;
        for crumbs in 60..=66 {
            let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
            // From here on no more than 512 bytes are read at once for a header.
            assert_eq!(client.write(0, &pattern(0, PIPE_MAX_BYTES)).await, 0);
            let mut bytes = client.header(cmd::WRITE, 0, 1, 0, LONGEST);
            bytes.resize(512, 0xee);
            client.stream.write_all(&bytes).await.expect("sends");
            for _ in 0..crumbs {
                client.stream.write_all(&[0xee]).await.expect("sends");
            }
        }
        until("the end of all connections", || served.server.connections() == 0).await;
        assert!(disk.bytes_at(0, MIB) == pattern(0, MIB));
    })
    .await;
}

#[tokio::test]
async fn a_long_write_that_hangs_in_the_disk_holds_up_nothing_else_of_its_client() {
    within(async {
        for declines in [false, true] {
            let disk = MemoryDisk::patterned(2 * MIB);
            disk.at_once.store(true, Ordering::SeqCst);
            let served = serve(&disk).await;
            let mut client = Client::connect(&served.path, ReplyStyle::Structured).await;
            // From here on the header comes alone.
            assert_eq!(client.write(0, &pattern(0, PIPE_MAX_BYTES)).await, 0);
            for round in 0..3 {
                let release = disk.hang_next_write();
                let begun = disk.writes_begun.load(Ordering::SeqCst);
                let data = vec![round + 1; 100_000];
                client.send_write(5, MIB as u64, &data).await;
                until("the write", || disk.writes_begun.load(Ordering::SeqCst) > begun).await;
                for offset in [0, 300_000] {
                    assert!(client.read(offset, 65_536).await == pattern(offset as usize, 65_536));
                    assert_eq!(client.write(offset, &pattern(offset as usize, 131_072)).await, 0);
                }
                assert_eq!(client.call(cmd::FLUSH, 0, 0, 0).await.error, 0);
                disk.declines_pipes.store(declines, Ordering::SeqCst);
                // Half of the next one has come when the first ends.
                let next = [client.header(cmd::WRITE, 0, 6, 0, LONGEST), pattern(0, PIPE_MAX_BYTES)].concat();
                client.stream.write_all(&next[..50_000]).await.expect("sends");
                release.send(()).expect("it hangs");
                let reply = client.reply().await;
                assert_eq!((reply.cookie, reply.error), (5, 0));
                client.stream.write_all(&next[50_000..]).await.expect("sends");
                assert_eq!(client.reply().await.cookie, 6);
                assert!(client.read(MIB as u64, 100_000).await == data);
                disk.declines_pipes.store(false, Ordering::SeqCst);
                // It is careful for a while, then serves at once again.
                tokio::time::sleep(Duration::from_millis(2000)).await;
                let before = piped(&disk);
                assert_eq!(client.write(0, &pattern(0, 65_536)).await, 0);
                assert_eq!(client.write(0, &pattern(0, 65_536)).await, 0);
                assert!(piped(&disk) > before);
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_long_write_that_fails_says_so_and_the_next_request_is_understood() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        disk.at_once.store(true, Ordering::SeqCst);
        let served = serve(&disk).await;
        for style in STYLES {
            let mut client = Client::connect(&served.path, style).await;
            assert_eq!(client.write(0, &pattern(0, 65_536)).await, 0);
            *disk.refusal.lock() = Some(NbdErrno::NoSpc);
            for _ in 0..5 {
                assert_eq!(client.write(0, &[1; 65_536]).await, NbdErrno::NoSpc.to_wire());
                assert!(client.read(0, 65_536).await == pattern(0, 65_536));
            }
            *disk.refusal.lock() = None;
            assert_eq!(client.write(0, &pattern(0, 65_536)).await, 0);
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_long_payload_leaves_no_trace() {
    within(async {
        let disk = MemoryDisk::patterned(MIB);
        disk.at_once.store(true, Ordering::SeqCst);
        let served = serve(&disk).await;
        for sent in [0, 100, 20_000, 131_071] {
            let mut client = Client::connect(&served.path, ReplyStyle::Simple).await;
            assert_eq!(client.write(0, &pattern(0, 131_072)).await, 0);
            let mut bytes = client.header(cmd::WRITE, 0, 1, 0, LONGEST);
            bytes.resize(bytes.len() + sent, 0xee);
            client.stream.write_all(&bytes).await.expect("sends");
        }
        until("the end of all connections", || served.server.connections() == 0).await;
        assert!(disk.bytes_at(0, MIB) == pattern(0, MIB));
    })
    .await;
}

#[tokio::test]
async fn long_replies_that_nobody_takes_hold_up_nobody_and_come_later() {
    within(async {
        let disk = MemoryDisk::patterned(2 * MIB);
        disk.at_once.store(true, Ordering::SeqCst);
        let served = serve(&disk).await;
        let mut lazy = Vec::new();
        for style in STYLES {
            let mut client = Client::connect(&served.path, style).await;
            for cookie in 0..100 {
                client.send(cmd::READ, 0, cookie, cookie * 4096, LONGEST).await;
            }
            lazy.push(client);
        }
        let mut busy = Client::connect(&served.path, ReplyStyle::Structured).await;
        for _ in 0..20 {
            assert_eq!(busy.write(MIB as u64, &[3; 65_536]).await, 0);
            assert_eq!(busy.read(MIB as u64, 65_536).await, [3; 65_536]);
        }
        // What they are sent is what the disk holds when they take it, or held when they asked.
        assert!(piped(&disk) < 3 * 20 + 40, "{} requests were served through pipes", piped(&disk));
        let one_gone = lazy.pop();
        drop(one_gone);
        for client in &mut lazy {
            for cookie in 0..100 {
                let reply = client.reply().await;
                assert!(reply.cookie == cookie && reply.data == pattern(cookie as usize * 4096, PIPE_MAX_BYTES));
            }
        }
        let mut all = lazy;
        for client in &mut all {
            client.send(cmd::DISC, 0, 0, 0, 0).await;
            client.expect_end().await;
        }
    })
    .await;
}

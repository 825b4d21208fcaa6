//! Many clients at once, most of them with bad manners: memory stays bounded, and the one that behaves is served.

use blockferry::core::nbd::ReplyStyle;
use blockferry::core::nbd::wire::cmd;

use crate::client::Client;
use crate::disk::{assert_same, noise};
use crate::kinds::{Kind, STYLES, on_both_kinds};

/// One less than the daemon takes, so that there is a place for the one that behaves.
const CROWD: usize = 255;

/// What the daemon may need, whatever clients do; generous.
const MOST_BYTES: u64 = 600 << 20;

/// Small requests and large ones, all answered.
#[track_caller]
fn serves(kind: &Kind, client: &mut Client) {
    for nth in 0..6 {
        let len = [512, 4096, 65_536, 256 << 10, 1 << 20, 3 << 20][nth as usize];
        let data = noise(len, nth);
        client.write(1 << 20, &data);
        client.succeeds(cmd::FLUSH, 0, 0, 0);
        assert_same("beside the crowd", &client.read(1 << 20, len as u64), &data);
        assert_same("beside the crowd", &client.read(0, 4096), &kind.bytes[..4096]);
    }
}

#[track_caller]
fn assert_bounded(kind: &Kind) {
    let peak = kind.peak_bytes();
    eprintln!("the daemon's most memory: {} MiB", peak >> 20);
    assert!(peak < MOST_BYTES, "the daemon needed {} MiB", peak >> 20);
}

/// Each announces 32 MiB and sends a part of it, or nothing; the memory for it is there for a few.
#[test]
fn a_crowd_that_announces_large_writes() {
    on_both_kinds(20, 600, |kind| {
        let mut client = Client::new(kind.connect(ReplyStyle::Structured, 0));
        let mut crowd = Vec::new();
        for nth in 0..CROWD {
            let mut hostile = Client::new(kind.connect(STYLES[nth % 3], 0));
            let header = hostile.raw(cmd::WRITE, 0, 0, 32 << 20).bytes(hostile.style());
            hostile.connection.raw(&header);
            hostile.connection.raw(&vec![0xaa; [0, 1000, 100_000][nth / 3 % 3]]);
            assert!(hostile.connection.send());
            crowd.push(hostile);
        }
        serves(kind, &mut client);
        assert_bounded(kind);
        drop(crowd);
        assert_same("nothing was written", &client.read(0, 1 << 20), &kind.bytes[..1 << 20]);
    });
}

/// Each asks for far more than its socket holds, and takes nothing.
#[test]
fn a_crowd_that_takes_no_replies() {
    on_both_kinds(21, 80, |kind| {
        let mut client = Client::new(kind.connect(ReplyStyle::Structured, 0));
        let mut crowd = Vec::new();
        for nth in 0..CROWD {
            let mut hostile = Client::new(kind.connect(STYLES[nth % 3], 1));
            let (command, len, count) = match (nth / 3 % 4, hostile.style()) {
                (0, _) => (cmd::READ, 1 << 20, 64),
                (1, _) => (cmd::READ, 2560, 1000),
                (2, _) | (_, ReplyStyle::Simple) => (cmd::READ, 131_072, 100),
                _ => (cmd::BLOCK_STATUS, 4 << 20, 300),
            };
            for turn in 0..count {
                let raw = hostile.raw(command, 0, turn % 1000 * 512, len);
                hostile.submit(&raw, &[]);
            }
            assert!(hostile.connection.send());
            crowd.push(hostile);
        }
        serves(kind, &mut client);
        assert_bounded(kind);
        // They were not forgotten.
        for hostile in crowd.iter_mut().step_by(50) {
            let asked = hostile.connection.open_requests();
            assert_eq!(hostile.connection.drain().len(), asked);
        }
    });
}
